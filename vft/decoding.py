"""The autoregressive loop: what is asked for, the buffers of a run, and the schedule of its steps.

Samples are ordered by how many tokens they still need, most first, so that those still active are always the first
ones: a finished one drops out of every buffer by a shorter view. With guidance, rows 2 s and 2 s + 1 are the
conditional and the unconditional row of sample s.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from flexkernels import backend, sample_logits

from .capture import capture
from .config import GeneratorConfig

# cache lengths that share one CUDA graph
BUCKET = 256
# rows of one caption that one attention call over its keys serves
SHARED_ROWS = 16


@dataclass(frozen=True)
class Request:
    """A checked request, samples in order of decreasing steps; ``order[i]`` is the caller's row of sample i."""

    frames: int
    levels: int
    guided: bool
    order: list[int]
    conditions: list
    prompts: list[list[int]]
    stops: list[int]

    @classmethod
    def checked(cls, config: GeneratorConfig, conditions, *, frames, tokens_per_frame, prompt, guided) -> Request:
        """Raises TypeError or ValueError naming the argument."""
        check_integer("frames", frames, 1)
        n = len(conditions)
        if tokens_per_frame is None:
            tokens_per_frame = config.tokens_per_frame(frames)
        budgets = [tokens_per_frame] * max(n, 1) if isinstance(tokens_per_frame, int) else list(tokens_per_frame)
        if len(budgets) != max(n, 1):
            raise ValueError(f"tokens_per_frame must be one int or one a row ({n}), got {len(budgets)}")
        for k in budgets:
            check_integer("tokens_per_frame", k, 1)
            if frames * k > config.seq_len:
                raise ValueError(
                    f"frames * tokens_per_frame must be at most seq_len = {config.seq_len}, got {frames} * {k}"
                )
        stops = [frames * k for k in budgets[:n]]
        prompts = _prompts(prompt, n, stops, config.vocab)
        order = sorted(range(n), key=lambda r: len(prompts[r]) - stops[r])
        pick = lambda values: [values[r] for r in order]  # noqa: E731
        return cls(frames, max(budgets), guided, order, pick(conditions), pick(prompts), pick(stops))

    @property
    def steps(self) -> list[int]:
        """Tokens that each sample needs, never rising."""
        return [stop - len(prompt) for stop, prompt in zip(self.stops, self.prompts, strict=True)]

    def ids(self, flat: torch.Tensor, levels: int) -> torch.Tensor:
        """The first levels of flat ``[n, tokens]``, in the caller's order of rows: ``[n, frames, levels]``."""
        flat = flat[:, : self.frames * levels]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        if inverse != list(range(len(inverse))):
            flat = flat[torch.tensor(inverse, device=flat.device)]
        return flat.unflatten(-1, (levels, self.frames)).transpose(1, 2)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: what :func:`flexkernels.sample_logits` takes, and a seed of at least 0; guidance None is 1.

    Raises TypeError or ValueError naming the setting.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        # the op checks its own arguments; from no rows it draws nothing, wherever the model's logits will be
        none = torch.empty(0, 1)
        with backend("reference"):
            sample_logits(none, uncond_logits=none, **self.options())

    @property
    def guided(self) -> bool:
        return self.guidance is not None and self.guidance != 1

    def options(self) -> dict:
        """The keyword arguments of ``sample_logits`` beyond the logits and the seeds."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "guidance": 1.0 if self.guidance is None else self.guidance,
        }  # fmt: skip


def check_range(name: str, ids: torch.Tensor, vocab: int) -> None:
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"{name} must lie in 0..{vocab - 1}, got {low if low < 0 else high}")


def check_integer(name: str, value, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value < 2**63:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _prompts(prompt, n: int, stops: Sequence[int], vocab: int) -> list[list[int]]:
    if prompt is None:
        return [[] for _ in range(n)]
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 1:
        prompt = [prompt] * n
    rows = [torch.as_tensor(row, dtype=None if len(row) else torch.int64) for row in prompt]
    if len(rows) != n:
        raise ValueError(f"prompt must hold one row for all or one a row ({n}), got {len(rows)}")
    for row, stop in zip(rows, stops, strict=True):
        if row.dim() != 1 or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"prompt must be int [p] a row, got {row.dtype} {list(row.shape)}")
        if len(row) > stop:
            raise ValueError(f"prompt must have at most frames * tokens_per_frame = {stop} tokens, got {len(row)}")
        if len(row):
            check_range("prompt", row, vocab)
    return [row.tolist() for row in rows]


def check_nan(nan: torch.Tensor, name: str = "") -> None:
    """Raises ValueError where a flag of ``nan`` is set; waits for the device."""
    if nan.any():
        raise ValueError(f"{name}the generator's logits are NaN: its weights or the caption are not fit for its dtype")


class View(NamedTuple):
    """The active part of every buffer; see :class:`State`."""

    ids: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    next: torch.Tensor
    offset: torch.Tensor
    seed: torch.Tensor
    out: torch.Tensor
    nan: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cross: list


class State:
    """Every buffer of a run, allocated once, and filled anew by :meth:`begin` for another run of the same shape.

    ``k``, ``v``: ``[layers, rows, heads, max_len, head_dim]``; ``ids``, ``position`` int64 ``[rows]``: the next input
    and where it stands; ``length`` int32 ``[rows]``: keys in the cache; ``seed``, ``offset`` int64 ``[samples]``: of
    the next draw; ``out`` int64 ``[n, tokens]``: -1 where there is no token; ``nan`` bool ``[rows]``: whether any
    logit was; ``cross``: (k, v, context_len) for each layer; ``stack``: the model's blocks as ``transformer_step_``
    takes them. ``spare`` more positions are there for tokens beyond the last one, up to ``spare`` of a row at once.
    """

    def __init__(self, model, request: Request, samples: int, sampling: Sampling, spare: int = 0, cross=None) -> None:
        config, device, dtype = model.config, model.device, model.sos.dtype
        self.seq_len, self.branches = config.seq_len, 2 if request.guided else 1
        self.samples, self.sampler = samples, sampling.options()
        self.max_len = max(request.stops[:samples], default=0) + spare
        rows, n = samples * self.branches, len(request.stops)
        shape = (config.depth, rows, config.heads, self.max_len, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        integers = {"dtype": torch.int64, "device": device}
        self.position, self.ids = (torch.empty(rows, **integers) for _ in range(2))
        self.seed, self.offset = (torch.empty(samples, **integers) for _ in range(2))
        self.length = torch.empty(rows, dtype=torch.int32, device=device)
        self.nan = torch.empty(rows, dtype=torch.bool, device=device)
        self.out = torch.empty(n, request.frames * request.levels + spare, **integers)
        self.cross = contexts(model, request, samples, SHARED_ROWS // max(spare, 1)) if cross is None else cross
        self.contexts = 1 if self.cross[0] is None else len(self.cross[0][2])
        self.stack = model.stack()
        self._views: dict[tuple[int, int], View] = {}
        self.begin(request, sampling)

    def begin(self, request: Request, sampling: Sampling) -> None:
        """Before the first token of a run; keys and values are what :func:`prefill` writes."""
        lengths = torch.tensor([len(p) for p in request.prompts[: self.samples]], dtype=torch.int64)
        order = torch.tensor(request.order[: self.samples], dtype=torch.int64)
        self.position.copy_(lengths.repeat_interleave(self.branches))
        self.length.copy_(self.position + 1)
        self.offset.copy_(order * self.seq_len + lengths)
        self.ids.zero_()
        self.seed.fill_(sampling.seed)
        self.nan.zero_()
        out = torch.full(self.out.shape, -1)
        for row, prompt in zip(out, request.prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        self.out.copy_(out)

    def view(self, samples: int, limit: int) -> View:
        """The buffers of the first ``samples`` samples and the first ``limit`` cache positions."""
        key = (samples, limit)
        if key not in self._views:
            rows = samples * self.branches
            contexts = min(self.contexts, rows)
            cross = [c and tuple(t[:contexts] for t in c) for c in self.cross]
            position = self.position[:rows]
            self._views[key] = View(
                self.ids[:rows], position, self.length[:rows], position[:: self.branches], self.offset[:samples],
                self.seed[:samples], self.out[:samples], self.nan[:rows], self.k[:, :rows, :, :limit],
                self.v[:, :rows, :, :limit], cross,
            )  # fmt: skip
        return self._views[key]

    def counters(self) -> list[torch.Tensor]:
        """What a step changes beside the caches."""
        return [self.ids, self.position, self.length, self.offset, self.out, self.nan]

    def check(self) -> None:
        """Raises ValueError where a logit was NaN; waits for the device."""
        check_nan(self.nan)


def contexts(model, request: Request, samples: int, most: int) -> list:
    """Keys, values and lengths of the captions for each layer, or Nones: one for each row, or where all samples share
    a caption and are at most so many, one that the rows of each branch share."""
    conditions = request.conditions[:samples]
    if not conditions:
        return [None] * model.config.depth
    shared = samples <= most and all(c is conditions[0] for c in conditions)
    conditions = conditions[:1] if shared else conditions
    return model.cross([c for condition in conditions for c in (condition, None)[: 2 if request.guided else 1]])


def prefill(model, request: Request, state: State) -> None:
    """Runs all prompts in one packed pass, equal ones once, fills the caches and draws each sample's first token."""
    conditions, prompts = request.conditions[: state.samples], request.prompts[: state.samples]

    def write(layer: int, row, position, k, v) -> None:
        state.k[layer][row, :, position] = k
        state.v[layer][row, :, position] = v

    x = run_prompts(model, conditions, prompts, state.branches, state.cross, write)
    model.draw(x, state.view(state.samples, state.max_len), state.sampler)


def run_prompts(model, conditions: list, prompts: list[list[int]], branches: int, cross: list, write) -> torch.Tensor:
    """One packed pass over all prompts, equal ones once: normed outputs ``[samples * branches, width]`` of each last
    input.

    Row ``sample * branches + branch`` is that of the condition or, at branch 1, of none. cross: (k, v, context_len) a
    layer, whose contexts the rows cycle through, or None. write(layer, row, position, k, v) receives the keys and
    values ``[entries, heads, head_dim]`` of every row and position, int64 ``[entries]`` each.
    """
    sequences, source, device = {}, [], model.device
    contexts = 1 if cross[0] is None else len(cross[0][2])
    for sample, prompt in enumerate(prompts):
        for branch, c in enumerate((conditions[sample], None)[:branches]):
            # captions are compared by identity: rows of one caption hold one tensor
            key = (c if isinstance(c, int) else ("caption", id(c)), tuple(prompt))
            context = (sample * branches + branch) % contexts
            source.append(sequences.setdefault(key, (len(sequences), c, context, prompt))[0])
    _, conditions, contexts, prompts = zip(*sequences.values(), strict=True)
    contexts = torch.tensor(contexts, device=device)
    # one layer's at a time
    cross = (c and tuple(t[contexts] for t in c) for c in cross)
    ids = [torch.tensor(p, dtype=torch.int64).to(device) for p in prompts]
    lengths = torch.tensor([len(i) + 1 for i in ids])
    ends = lengths.cumsum(0)
    # token of the packed pass, row and position of every cache entry
    counts = lengths[source]
    row = torch.arange(len(source)).repeat_interleave(counts)
    position = torch.cat([torch.arange(int(n)) for n in counts])
    token = ((ends - lengths)[source][row] + position).to(device)
    row, position = row.to(device), position.to(device)
    x = model.packed(
        ids, model.starts(conditions), cross, lambda layer, k, v: write(layer, row, position, k[token], v[token])
    )
    return x[(ends - 1)[source].to(device)]


class Graphs:
    """The step as CUDA graphs, one for each (samples, limit), captured on first use."""

    def __init__(self, model, state: State) -> None:
        # a model keeps its graphs: they must not keep it
        self.model, self.state = weakref.proxy(model), state
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def step(self, samples: int, limit: int) -> None:
        key = (samples, limit)
        if key not in self.graphs:
            # what the call before the capture draws is drawn again by the replay
            run = partial(self.model.step, self.state, samples, limit)
            self.graphs[key], _ = capture(run, self.state.counters(), self.pool)
        self.graphs[key].replay()


@torch.no_grad()
def levels(model, request: Request, sampling: Sampling, cuda_graph: bool | None = None) -> Iterator[torch.Tensor]:
    """Yields ids ``[n, frames, levels so far]`` in the caller's order of rows; ``cuda_graph`` None: on a GPU."""
    cuda_graph = model.device.type == "cuda" if cuda_graph is None else cuda_graph
    samples = sum(count > 0 for count in request.steps)
    if not cuda_graph or not samples:
        state = State(model, request, samples, sampling)
        yield from _steps(model, request, state, None)
        return
    with model.replays.run(model, request, samples, sampling) as (state, graphs):
        yield from _steps(model, request, state, graphs)


def _steps(model, request: Request, state: State, graphs: Graphs | None) -> Iterator[torch.Tensor]:
    if state.samples:
        prefill(model, request, state)
    # another run may fill a state with graphs anew
    ids = lambda levels: request.ids(state.out if graphs is None else state.out.clone(), levels)  # noqa: E731
    steps, shown = request.steps, 0
    for done in range(1, steps[0] if steps else 0):
        shown, before = _complete(request, steps, done), shown
        if shown > before:
            # a look at a GPU would hold up its next steps
            if model.device.type == "cpu":
                state.check()
            yield ids(shown)
        active = sum(count > done for count in steps)
        if graphs is None:
            model.step(state, active, state.max_len)
        else:
            longest = max(len(p) for p in request.prompts[:active]) + done + 1
            graphs.step(active, min(state.max_len, -(-longest // BUCKET) * BUCKET))
    state.check()
    yield ids(request.levels)


def _complete(request: Request, steps: list[int], done: int) -> int:
    """Levels that every unfinished row has after ``done`` of its own steps."""
    tokens = [len(p) + done for p, count in zip(request.prompts, steps, strict=True) if count > done]
    return min(tokens, default=0) // request.frames

"""Continuous batching: requests of any settings join a running batch, and leave it when they are done.

A request takes one row of the batch, with guidance two: its own and that of the unconditional branch. Active rows are
always the first ones: where a request leaves, the last rows move into its place. On a GPU the forward pass is one CUDA
graph for each bucket of rows and of cache length, in which rows beyond the active ones are masked; the draws, one call
for all requests of equal settings, follow it eagerly while the device works on the pass.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

from flexkernels import sample_logits

from .capture import capture
from .decoding import BUCKET, Request, Sampling, check_nan, run_prompts

# the longest caption that vft.text.encode_captions gives
TEXT_LEN = 256


class RowsView(NamedTuple):
    """What one step of the model reads and writes, of the first rows and cache positions; see :class:`Session`."""

    ids: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cross: list


class _Run:
    """A request in the session: ``rows`` of the batch, and ``tokens`` drawn or given so far."""

    def __init__(self, handle: int, request: Request, sampling: Sampling) -> None:
        self.handle, self.request, self.sampling = handle, request, sampling
        self.branches = 2 if request.guided else 1
        self.tokens = len(request.prompts[0])
        self.stop = request.stops[0]
        self.rows: list[int] = []

    @property
    def done(self) -> bool:
        return self.tokens == self.stop


class Session:
    """A batch that requests join and leave; made by :meth:`vft.Generator.session`, which describes it.

    ``waiting`` and ``running``: how many requests do.
    """

    def __init__(self, model, max_rows: int, max_len: int, text_len: int, cuda_graph: bool) -> None:
        config, device, dtype = model.config, model.device, model.sos.dtype
        self.model, self.max_rows, self.max_len, self.text_len = model, max_rows, max_len, text_len
        shape = (config.depth, max_rows, config.heads, max_len, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        # per row: the next input, its position, 1 where it is active, seed, keys in the cache, whether a logit was NaN
        integers = {"dtype": torch.int64, "device": device}
        self.ids, self.position, self.active, self.seed = (torch.zeros(max_rows, **integers) for _ in range(4))
        self.length = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.nan = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self.out = torch.zeros(max_rows, max_len, **integers)
        self.cross: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = [None] * config.depth
        if text_len:
            self.context_len = torch.zeros(max_rows, dtype=torch.int32, device=device)
            context = (max_rows, config.heads, text_len, config.head_dim)
            make = lambda: torch.zeros(context, dtype=dtype, device=device)  # noqa: E731
            self.cross = [(make(), make(), self.context_len) for _ in range(config.depth)]
        self.stack = model.stack()
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
        # the request of each active row
        self._owners: list[_Run] = []
        self._finished: deque[tuple[_Run, torch.Tensor, torch.Tensor]] = deque()
        self._groups: list | None = None
        self._next_handle = 0
        self._views: dict[tuple[int, int], RowsView] = {}
        self._graphs: dict = {}
        self._pool = torch.cuda.graph_pool_handle() if cuda_graph else None
        self.cuda_graph = cuda_graph

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(
        self, class_id: int | str | torch.Tensor | None = None, text_emb: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None, *, frames: int = 5, tokens_per_frame: int | None = None,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        guidance: float | None = None, seed: int = 0, prompt: torch.Tensor | None = None,
    ) -> int:  # fmt: skip
        """Queues one sample and returns its handle; arguments as for :meth:`vft.Generator.stream`, for one row.

        It starts at a later :meth:`step`, in the order of calls, as soon as there is a row for it, or two with
        guidance.

        Raises:
            TypeError, ValueError: as :meth:`vft.Generator.stream`; a request that this session has no room for even
                when it is empty: more tokens than ``max_len``, a caption longer than ``text_len``, guidance in a
                session of one row.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, guidance, seed)
        request = self.model.request(class_id, text_emb, text_mask, 1, frames, tokens_per_frame, prompt, sampling)
        run = _Run(self._next_handle, request, sampling)
        if run.branches > self.max_rows:
            raise ValueError(f"max_rows must be at least 2 for a request with guidance, got {self.max_rows}")
        if run.stop > self.max_len:
            raise ValueError(f"frames * tokens_per_frame must be at most max_len = {self.max_len}, got {run.stop}")
        caption = request.conditions[0]
        if isinstance(caption, torch.Tensor) and len(caption) > self.text_len:
            raise ValueError(f"text_emb must have at most text_len = {self.text_len} tokens, got {len(caption)}")
        self._next_handle += 1
        self._waiting.append(run)
        return run.handle

    @torch.no_grad()
    def step(self) -> None:
        """Draws the next token of every running request, then starts waiting ones, which draws their first.

        Nothing is read back from the device. Without any request it does nothing.
        """
        if self._running:
            self._draw(self._forward(), self._grouped())
            self.position.add_(self.active)
            for run in self._running:
                run.tokens += 1
            self._leave([run for run in self._running if run.done])
        while self._waiting and len(self._owners) + self._waiting[0].branches <= self.max_rows:
            self._start(self._waiting.popleft())

    def finished(self) -> list[tuple[int, torch.Tensor]]:
        """(handle, ids int64 ``[frames, tokens_per_frame]``) of the requests done since the last call, in their order.

        Raises ValueError where a request's logits were NaN; what finished beside it is there at other calls.
        """
        done = []
        while self._finished:
            run, flat, nan = self._finished[0]
            if done and nan.any():
                break
            self._finished.popleft()
            check_nan(nan, f"request {run.handle}: ")
            done.append((run.handle, flat.view(-1, run.request.frames).T.contiguous()))
        return done

    def cancel(self, handle: int) -> None:
        """Drops a waiting or running request; others can take its rows at the next step.

        Raises ValueError for any other handle.
        """
        for run in self._waiting:
            if run.handle == handle:
                self._waiting.remove(run)
                return
        for run in self._running:
            if run.handle == handle:
                self._drop(run)
                return
        raise ValueError(f"handle must be that of a waiting or running request, got {handle!r}")

    def _start(self, run: _Run) -> None:
        """Gives the request its rows, runs its prompt as `generate` would, and draws its first token."""
        run.rows = list(range(len(self._owners), len(self._owners) + run.branches))
        self._owners += [run] * run.branches
        self._running.append(run)
        self._groups = None
        request, prompt, rows = run.request, run.request.prompts[0], slice(run.rows[0], run.rows[-1] + 1)
        self.out[rows, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64).to(self.out.device)
        self.position[rows] = len(prompt)
        self.seed[rows] = run.sampling.seed
        self.nan[rows] = False
        self.active[rows] = 1
        if run.done:
            return self._leave([run])
        cross = self.model.cross([request.conditions[0], None][: run.branches])
        for mine, given in zip(self.cross, cross, strict=True):
            if mine is not None:
                for buffer, value in zip(mine[:2], given[:2], strict=True):
                    buffer[rows, :, : value.shape[2]] = value
                self.context_len[rows] = given[2]

        def write(layer: int, row, position, k, v) -> None:
            self.k[layer, rows][row, :, position] = k
            self.v[layer, rows][row, :, position] = v

        x = run_prompts(self.model, request.conditions, [prompt], run.branches, cross, write)
        logits = self.model.head(x)
        self.nan[rows].logical_or_(logits.amax(1).isnan())
        cond = self.position.new_zeros(1)
        uncond = cond + 1 if run.branches == 2 else None
        at = cond + run.rows[0]
        self._draw(logits, [(run.sampling, (cond, uncond), (at, None if uncond is None else at + 1))])
        self.position[rows] += 1
        run.tokens += 1
        if run.done:
            self._leave([run])

    def _forward(self) -> torch.Tensor:
        """Logits ``[rows, vocab]`` of the next token of the active rows, and of masked ones behind them."""
        rows = len(self._owners)
        if not self.cuda_graph:
            return self._pass(rows, self.max_len)
        longest = max(run.tokens for run in self._running) + 1
        key = min(self.max_rows, 1 << (rows - 1).bit_length()), min(self.max_len, -(-longest // BUCKET) * BUCKET)
        if key not in self._graphs:
            # a pass before the capture writes what its replay writes again
            self._graphs[key] = capture(lambda: self._pass(*key), pool=self._pool)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _pass(self, rows: int, limit: int) -> torch.Tensor:
        key = (rows, limit)
        if key not in self._views:
            self._views[key] = RowsView(
                self.ids[:rows], self.position[:rows], self.length[:rows], self.k[:, :rows, :, :limit],
                self.v[:, :rows, :, :limit], [c and tuple(t[:rows] for t in c) for c in self.cross],
            )  # fmt: skip
        view = self._views[key]
        # a masked row stays at its first position
        view.length.copy_(view.position)
        logits = self.model.head(self.model.hidden(view, self.stack))
        # the largest is NaN where any is
        self.nan[:rows].logical_or_(logits.amax(1).isnan())
        return logits

    def _grouped(self) -> list[tuple[Sampling, tuple, tuple]]:
        """(sampling, rows of the logits, rows of the batch) of each set of requests whose settings are equal."""
        if self._groups is None:
            groups: dict[tuple, list[_Run]] = {}
            for run in self._running:
                groups.setdefault((run.branches, *run.sampling.options().values()), []).append(run)
            self._groups = []
            for (branches, *_), runs in groups.items():
                rows = torch.tensor([run.rows for run in runs]).to(self.out.device).T.contiguous()
                pair = (rows[0], rows[1] if branches == 2 else None)
                self._groups.append((runs[0].sampling, pair, pair))
        return self._groups

    def _draw(self, logits: torch.Tensor, groups: list[tuple[Sampling, tuple, tuple]]) -> None:
        """A call for each (sampling, rows (cond, uncond) of the logits, those of the batch that its tokens go to)."""
        for sampling, (cond, uncond), (row, other) in groups:
            # the position in the sequence is the offset of a single run's first row
            position = self.position[row]
            drawn = sample_logits(
                logits[cond], uncond_logits=None if uncond is None else logits[uncond], seed=self.seed[row],
                offset=position, **sampling.options(),
            )  # fmt: skip
            self.out[row, position] = drawn
            for each in (row,) if other is None else (row, other):
                self.ids[each] = drawn

    def _leave(self, runs: list[_Run]) -> None:
        for run in runs:
            first, last = run.rows[0], run.rows[-1]
            self._finished.append((run, self.out[first, : run.stop].clone(), self.nan[first] | self.nan[last]))
            self._drop(run)

    def _drop(self, run: _Run) -> None:
        """Moves the last rows into those of the request."""
        self._running.remove(run)
        self._groups = None
        for row in sorted(run.rows, reverse=True):
            last = len(self._owners) - 1
            owner = self._owners[last]
            if row != last:
                self._move(last, row, owner.tokens)
                owner.rows[owner.rows.index(last)] = row
                self._owners[row] = owner
            self._owners.pop()
            self.active[last] = 0
            self.position[last] = 0

    def _move(self, source: int, target: int, length: int) -> None:
        """A row to another place, with the first ``length`` keys and values of its cache."""
        for caches in (self.k, self.v):
            caches[:, target, :, :length] = caches[:, source, :, :length]
        for buffer in (self.ids, self.position, self.seed, self.nan, self.out):
            buffer[target] = buffer[source]
        if self.text_len:
            self.context_len[target] = self.context_len[source]
            for k, v, _ in self.cross:
                k[target], v[target] = k[source], v[source]

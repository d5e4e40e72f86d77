"""Exact speculative decoding: a cheap draft proposes tokens, the model verifies all of them in one step.

A draw is a function of the logits and of random numbers that seed and position fix (`flexkernels.sample_logits`). The
draft draws its proposals from its own logits with the model's random numbers; the model draws from its logits at all
these positions at once, again with the same numbers. Its draws are the tokens up to the first that the proposals differ
from, and that one too, since what came before it was right. So the ids are those that the model draws alone, with every
filter and guidance, and the draft decides only how many a step gives: two draws with common random numbers agree with
a probability of at least (1 - d) / (1 + d) at a total variation distance d of the two distributions.

Sources: arXiv 2211.17192 (speculative decoding; its own rule agrees with probability 1 - d, and keeps the distribution
but not the ids); arXiv 2408.07978 (common random numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from flexkernels import sample_logits

from .capture import capture
from .decoding import BUCKET, Request, Sampling, State, check_integer, prefill, run_prompts

# one step takes the proposals and the token before them, and decode_attention 16 tokens a row
MOST_PROPOSED = 15


def check_draft(model, draft, tokens: int, request: Request) -> None:
    """Raises TypeError or ValueError where the draft cannot propose tokens for the model."""
    if not isinstance(draft, type(model)):
        raise TypeError(f"draft must be a Generator, got {type(draft).__name__}")
    check_integer("draft_tokens", tokens, 1)
    if tokens > MOST_PROPOSED:
        raise ValueError(f"draft_tokens must be at most {MOST_PROPOSED}, got {tokens}")
    for name in ("vocab", "cond", "n_classes", "classes", "ctx_dim"):
        mine, other = getattr(model.config, name), getattr(draft.config, name)
        if mine != other:
            raise ValueError(f"draft must have the model's {name} {mine!r}, got {other!r}")
    if draft.device != model.device:
        raise ValueError(f"draft must be on {model.device} like the model, got {draft.device}")
    longest = max(request.stops, default=0)
    if draft.config.seq_len < longest:
        raise ValueError(f"draft must have a seq_len of at least {longest} tokens, got {draft.config.seq_len}")


class Speculation:
    """The buffers of a run: the model's :class:`State`, whose ``out`` holds proposals too, and the draft's caches.

    ``position`` int64 ``[samples]``: tokens that each sample has. Input i of a sequence is token i - 1.
    """

    def __init__(self, model, draft, tokens: int, request: Request, sampling: Sampling) -> None:
        self.model, self.draft, self.tokens = model, draft, tokens
        samples = sum(count > 0 for count in request.steps)
        self.state = State(model, request, samples, sampling, spare=tokens + 1)
        prefill(model, request, self.state)
        self.position = self.state.position[:: self.state.branches].clone()
        # of the draws: a sample's offset less its position
        self.base = self.state.offset - self.position
        device = model.device
        self.stops = torch.tensor(request.stops[:samples]).to(device)
        # captions in the draft's dtype; rows of one caption hold one tensor
        cast = {id(c): c.to(draft.sos.dtype) for c in request.conditions if isinstance(c, torch.Tensor)}
        request = replace(request, conditions=[cast.get(id(c), c) for c in request.conditions])
        self.drafted = State(draft, request, samples, sampling, spare=tokens + 1)
        self._fill(request, samples)
        conditions = [c for each in request.conditions[:samples] for c in (each, None)[: self.state.branches]]
        self.starts = draft.starts(conditions)
        self._graphs, self._pool = {}, None

    def _fill(self, request: Request, samples: int) -> None:
        """The draft's caches of the prompts."""

        def write(layer: int, row, position, k, v) -> None:
            self.drafted.k[layer][row, :, position] = k
            self.drafted.v[layer][row, :, position] = v

        prompts = request.prompts[:samples]
        run_prompts(self.draft, request.conditions[:samples], prompts, self.state.branches, self.drafted.cross, write)

    def round(self, limit: int) -> None:
        """Proposes, verifies, and moves each sample on by at least one token; ``limit`` bounds the caches read.

        Nothing here looks at a value on the host, so that a CUDA graph can hold it.
        """
        # the draft has not seen the last token, nor the one before where all of its proposals were right
        proposed = [self._draw(self.draft, self._step(self.draft, self.drafted, -1, 2, limit, self.starts)[:, -1:], 0)]
        for i in range(1, self.tokens):
            self._write(i - 1, proposed[-1])
            proposed.append(self._draw(self.draft, self._step(self.draft, self.drafted, i, 1, limit), i))
        self._write(self.tokens - 1, proposed[-1])
        drawn = self._draw(self.model, self._step(self.model, self.state, 0, self.tokens + 1, limit), 0)
        self._write(0, drawn)
        right = (drawn[:, :-1] == torch.cat(proposed, 1)).long().cumprod(1).sum(1)
        self.position.copy_(torch.minimum(self.position + right + 1, self.stops))

    def _step(self, model, state: State, first: int, n: int, limit: int, starts=None) -> torch.Tensor:
        """Normed outputs ``[rows, n, width]`` of the inputs from ``first`` on, counted from the last token's.

        starts ``[rows, width]``: input 0 of a row, where it may be among them.
        """
        branches = self.state.branches
        at = (self.position + first)[:, None] + torch.arange(n, device=self.position.device)
        ids = self.state.out.gather(1, (at - 1).clamp_min(0)).repeat_interleave(branches, 0)
        at = at.repeat_interleave(branches, 0)
        x = F.embedding(ids, model.tok_emb.weight)
        if starts is not None:
            x = torch.where((at == 0)[..., None], starts[:, None], x)
        # beyond the last token of a sequence are proposals alone
        x = x + F.embedding(at.clamp_max(model.config.seq_len), model.pos_emb)
        view = state.view(self.state.samples, limit)
        view.length.copy_(at[:, -1] + 1)
        return model.norm(model.blocks_step(x.flatten(0, 1), view)).view(len(at), n, -1)

    def _draw(self, model, x: torch.Tensor, first: int) -> torch.Tensor:
        """ids ``[samples, n]`` from x ``[rows, n, width]``, for the positions from ``first`` on."""
        samples, n = len(self.position), x.shape[1]
        logits = model.head(x.flatten(0, 1))
        if model is self.model:
            self.state.nan.logical_or_(logits.amax(1).isnan().view(-1, n).any(1))
        logits = logits.view(samples, self.state.branches, n, -1)
        uncond = logits[:, 1].flatten(0, 1) if self.state.branches == 2 else None
        offset = (self.base + self.position + first)[:, None] + torch.arange(n, device=x.device)
        seed = self.state.seed[:, None].expand(-1, n)
        return sample_logits(
            logits[:, 0].flatten(0, 1), uncond_logits=uncond, seed=seed.flatten(), offset=offset.flatten(),
            **self.state.sampler,
        ).view(samples, n)  # fmt: skip

    def _write(self, first: int, ids: torch.Tensor) -> None:
        at = (self.position + first)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self.state.out[: len(ids)].scatter_(1, at, ids)

    def replay(self, limit: int) -> None:
        """:meth:`round` as a CUDA graph, one for each limit."""
        if limit not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            changed = [self.state.out, self.state.nan, self.position]
            self._graphs[limit], _ = capture(lambda: self.round(limit), changed, self._pool)
        self._graphs[limit].replay()

    def tokens_of(self, stops: list[int]) -> torch.Tensor:
        """``out`` without what was proposed beyond the end of each row."""
        ends = torch.tensor(stops, device=self.state.out.device)[:, None]
        beyond = torch.arange(self.state.out.shape[1], device=ends.device) >= ends
        return self.state.out.masked_fill(beyond, -1)


@torch.no_grad()
def levels(model, draft, tokens: int, request: Request, sampling: Sampling, cuda_graph: bool) -> Iterator[torch.Tensor]:
    """:func:`vft.decoding.levels` with a draft; positions are read back once a round."""
    if not any(request.steps):
        state = State(model, request, 0, sampling)
        yield request.ids(state.out, request.levels)
        return
    run = Speculation(model, draft, tokens, request, sampling)
    advance = run.replay if cuda_graph else run.round
    shown = 0
    while True:
        have = run.position.tolist()
        left = [count for count, stop in zip(have, request.stops, strict=False) if count < stop]
        if not left:
            break
        complete = min(left) // request.frames
        if complete > shown:
            shown = complete
            run.state.check()
            yield request.ids(run.tokens_of(request.stops), shown)
        longest = max(have) + tokens + 1
        limit = -(-longest // BUCKET) * BUCKET if cuda_graph else run.state.max_len
        advance(min(run.state.max_len, limit))
    run.state.check()
    yield request.ids(run.tokens_of(request.stops), request.levels)

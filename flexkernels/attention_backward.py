"""Backward of attention in plain PyTorch, by blocks of rows that see (nearly) the same keys: never a dense N x N."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from .layout import MASKS, LayoutTensors, visible

# rows per block where a frame gives no natural one
BLOCK_ROWS = 512


class Span(NamedTuple):
    """Equal sequences of one side, computed together; frame and rank ``[n]``.

    index ``[batch, n]`` points into the packed tokens; it is None when they lie side by side from start on."""

    start: int
    batch: int
    frame: torch.Tensor
    rank: torch.Tensor
    index: torch.Tensor | None

    @property
    def length(self) -> int:
        return len(self.frame)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Packed ``[total, H, D]`` to ``[batch, H, n, D]``."""
        if self.index is not None:
            return x[self.index].transpose(1, 2)
        x = x[self.start : self.start + self.batch * self.length]
        return x.unflatten(0, (self.batch, self.length)).transpose(1, 2)

    def put(self, out: torch.Tensor, value: torch.Tensor) -> None:
        """``[batch, H, n, D]`` into its rows of the packed ``[total, H, D]``."""
        value = value.transpose(1, 2).to(out.dtype)
        if self.index is not None:
            out[self.index] = value
        else:
            out[self.start : self.start + self.batch * self.length] = value.flatten(0, 1)


class Block(NamedTuple):
    """Query rows of a sequence and the hull of the keys they see; partial: the hull holds unseen pairs."""

    rows: slice
    keys: slice
    partial: bool


class Group(NamedTuple):
    queries: Span
    keys: Span
    blocks: list[Block]


def attention_backward_blocks(
    grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, softmax_scale
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dV = P^T dO, dS = P (dP - rowsum(dP P)), dQ = scale dS K, dK = scale dS^T Q, block by block.

    A block holds all keys its rows see, so P is recomputed without lse. Products take operands in q's dtype, softmax
    and sums over blocks are float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
    for group in _groups(LayoutTensors(*layout), mask, cross):
        operands = (group.queries.take(q), group.keys.take(k), group.keys.take(v), group.queries.take(grad_out))
        weight = None if key_log_weight is None else group.keys.take(key_log_weight[:, None, None]).mT
        sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in operands[:3]]
        for block in group.blocks:
            rows, keys = block.rows, block.keys
            seen = _seen(group, block.rows, mask, cross)[:, keys].to(q.device) if block.partial else None
            pieces = [x[:, :, s] for x, s in zip(operands, (rows, keys, keys, rows), strict=True)]
            found = _block_backward(*pieces, seen, None if weight is None else weight[..., keys], scale)
            for total, s, value in zip(sums, (rows, keys, keys), found, strict=True):
                total[:, :, s] += value
        for span, grad, total in zip((group.queries, group.keys, group.keys), grads, sums, strict=True):
            span.put(grad, total)
    return grads


def _block_backward(q, k, v, grad_out, seen, weight, scale):
    heads = q.shape[1] // k.shape[1]
    if heads > 1:
        k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q @ k.transpose(-1, -2)).to(wide)
    if weight is not None:
        scores = scores + weight
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    p = torch.softmax(scores, -1)
    if seen is not None:
        p = p.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    dp = (grad_out @ v.transpose(-1, -2)).to(wide)
    ds = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p).mul_(scale).to(q.dtype)
    dk, dv = ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ grad_out
    if heads > 1:
        dk, dv = (x.unflatten(1, (-1, heads)).sum(2) for x in (dk, dv))
    return ds @ k, dk, dv


def _seen(group: Group, rows: slice, mask, cross) -> torch.Tensor:
    """Bool: which keys of the sequence these rows see."""
    q, k = group.queries, group.keys
    index = torch.arange(-q.length, 0)[rows]
    keys = torch.arange(-k.length, 0), k.frame, k.rank
    return visible(MASKS[mask], tuple(cross), index, q.frame[rows], q.rank[rows], *keys)


def _groups(t: LayoutTensors, mask, cross) -> list[Group]:
    sides = ((t.cu_seqlens, t.frame, t.rank), (t.cu_seqlens_k, t.frame_k, t.rank_k))
    key = tuple(tuple(x.cpu().numpy().tobytes() for x in side) for side in sides)
    return _groups_of(*key, mask, tuple(cross))


@lru_cache(maxsize=32)
def _groups_of(queries: tuple[bytes, ...], keys: tuple[bytes, ...], mask: int, cross: tuple[int, ...]) -> list[Group]:
    sides = [[np.frombuffer(data, dtype=np.int32).copy() for data in side] for side in (queries, keys)]
    same: dict[tuple[bytes, ...], list[int]] = {}
    for sequence in range(len(sides[0][0]) - 1):
        parts = [part for side in sides for part in _of_sequence(side, sequence)]
        if len(parts[0]) and len(parts[2]):
            same.setdefault(tuple(part.tobytes() for part in parts), []).append(sequence)
    groups = []
    for sequences in same.values():
        group = Group(*(_span(side, sequences) for side in sides), [])
        group.blocks.extend(_blocks(group, mask, cross))
        groups.append(group)
    return groups


def _of_sequence(side, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    bounds, frame, rank = side
    rows = slice(bounds[sequence], bounds[sequence + 1])
    return frame[rows], rank[rows]


def _span(side, sequences: list[int]) -> Span:
    frame, rank = (torch.from_numpy(x) for x in _of_sequence(side, sequences[0]))
    starts, length = [int(side[0][s]) for s in sequences], len(frame)
    side_by_side = starts == list(range(starts[0], starts[0] + length * len(starts), length))
    index = None if side_by_side else torch.tensor(starts)[:, None] + torch.arange(length)
    return Span(starts[0], len(starts), frame, rank, index)


def _blocks(group: Group, mask: int, cross: tuple[int, ...]) -> list[Block]:
    blocks: list[Block] = []
    for rows in _cuts(group.queries, mask):
        seen = _seen(group, rows, mask, cross)
        some = seen.any(0).nonzero()
        if not len(some):
            continue
        keys = slice(int(some[0]), int(some[-1]) + 1)
        partial = not bool(seen[:, keys].all())
        last = blocks[-1] if blocks else None
        # neighbours that see the same keys in full are one block
        if last and not (last.partial or partial) and (last.rows.stop, last.keys) == (rows.start, keys):
            blocks[-1] = last._replace(rows=slice(last.rows.start, rows.stop))
        else:
            blocks.append(Block(rows, keys, partial))
    return blocks


def _cuts(queries: Span, mask: int) -> list[slice]:
    """Rows by frame part, or of one block each."""
    if MASKS[mask] in ("frame_causal", "frame_causal_prefix"):
        part = 2 * queries.frame + (queries.rank >= 0)
        bounds = [0, *(part.diff().nonzero()[:, 0] + 1).tolist(), queries.length]
    else:
        bounds = [*range(0, queries.length, BLOCK_ROWS), queries.length]
    return [slice(*pair) for pair in pairwise(bounds)]

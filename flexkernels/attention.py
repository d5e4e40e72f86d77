"""Structured variable-length attention over packed sequences.

    S = softmax_scale * q k^T + key_log_weight,  P = softmax(S over visible keys),  out = P v,  lse = logsumexp(S)

``key_log_weight`` log(m) makes a key count as m identical keys. Shapes follow flash-attention's varlen convention.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import checks, library
from .layout import MASKS, SequenceLayout, visible

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor frame, Tensor rank, Tensor? key_log_weight, "
    "int mask, int[] cross, float softmax_scale, bool return_lse) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor frame, Tensor rank, "
    "Tensor? key_log_weight, int mask, int[] cross, float softmax_scale) -> (Tensor, Tensor, Tensor)"
)
# rows per block where a frame gives no natural one
BLOCK_ROWS = 512


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    softmax_scale: float | None = None,
    key_log_weight: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention over a packed batch under a :class:`SequenceLayout`.

    Args:
        q: ``[total, heads, head_dim]`` float32, bfloat16 or float16; may be a strided view.
        k, v: ``[total, kv_heads, head_dim]``, heads a multiple of kv_heads (grouped-query attention).
        layout: built for exactly these tokens. Rows beyond ``layout.total`` are allowed and give zeros.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        key_log_weight: float32 ``[total]``, finite (checked on the CPU alone), added to every logit of that key; no
            gradient flows to it.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out ``[total, heads, head_dim]`` in q's dtype; with ``return_lse`` also lse, float32 ``[total, heads]``
        (-inf for a row that sees nothing, whose out is 0).

    Raises:
        TypeError, ValueError: wrong dtype, device, shape, or a layout for other lengths, before any launch.
    """
    _check(q, k, v, layout, key_log_weight)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    mask = MASKS.index(layout.mask)
    out, lse = torch.ops.flexkernels.attention(
        q, k, v, layout.cu_seqlens, layout.frame, layout.rank, key_log_weight, mask, layout.cross, scale, return_lse
    )
    return (out, lse) if return_lse else out


def attention_ref(q, k, v, layout, *, softmax_scale=None, key_log_weight=None, return_lse=False):
    """The specification of :func:`attention`: dense scores, float32 arithmetic (float64 stays float64)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    seen = F.pad(layout.visible(), (0, len(k) - layout.total, 0, len(q) - layout.total))
    weight = None if key_log_weight is None else key_log_weight[None, None, :]
    scores = _scores(q.transpose(0, 1), k.transpose(0, 1), scale, seen, weight)
    out = _softmax(scores) @ _widen(v).transpose(0, 1).repeat_interleave(q.shape[1] // v.shape[1], 0)
    out = out.transpose(0, 1).to(q.dtype)
    return (out, torch.logsumexp(scores, -1).T) if return_lse else out


def _check(q, k, v, layout, key_log_weight) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, checks.FLOATS, 3)
        checks.same_device(name, x, "layout", layout)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        checks.reject("k and v", f"be {checks.short(q.dtype)} like q", f"{k.dtype} and {v.dtype}", TypeError)
    checks.shape("v", v, k.shape, " of k")
    if len(k) != len(q) or k.shape[2] != q.shape[2]:
        checks.reject("k", f"have {len(q)} rows and head_dim {q.shape[2]} like q", f"shape {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        checks.reject("q", f"have a multiple of k's {k.shape[1]} heads", f"{q.shape[1]} heads")
    if not 1 <= q.shape[2] <= 256:
        checks.reject("head_dim", "lie between 1 and 256", q.shape[2])
    if len(q) < layout.total:
        checks.reject("q", f"have at least the layout's {layout.total} rows", f"{len(q)} rows")
    if key_log_weight is not None:
        checks.tensor("key_log_weight", key_log_weight, (torch.float32,), 1)
        checks.shape("key_log_weight", key_log_weight, k.shape[:1])
        checks.same_device("key_log_weight", key_log_weight, "layout", layout)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q, k, scale, seen, weight):
    # q [..., H, n, D], k [..., Hk, m, D] -> float32 [..., H, n, m], -inf where not seen
    k = _widen(k).repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = scale * (_widen(q) @ k.transpose(-1, -2))
    if weight is not None:
        scores = scores + weight
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _softmax(scores):
    # a row that sees nothing is all -inf: zeros instead of NaN
    return torch.softmax(scores, -1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)


class _Block(NamedTuple):
    """Query rows q0:q1 of a sequence and the hull k0:k1 of the keys they see; partial: the hull holds unseen pairs."""

    q0: int
    q1: int
    k0: int
    k1: int
    partial: bool


class _Group(NamedTuple):
    """Sequences of identical structure, computed together: index [batch, n] into the packed tokens, or None when they
    lie side by side from start on."""

    start: int
    batch: int
    length: int
    index: torch.Tensor | None
    frame: torch.Tensor
    rank: torch.Tensor
    blocks: list[_Block]


def _groups(cu_seqlens, frame, rank, mask, cross) -> list[_Group]:
    key = tuple(t.cpu().numpy().tobytes() for t in (cu_seqlens, frame, rank))
    return _groups_of(*key, mask, tuple(cross))


@lru_cache(maxsize=32)
def _groups_of(cu_seqlens: bytes, frame: bytes, rank: bytes, mask: int, cross: tuple[int, ...]) -> list[_Group]:
    bounds, frame, rank = (np.frombuffer(data, dtype=np.int32).copy() for data in (cu_seqlens, frame, rank))
    same: dict[tuple[bytes, bytes], list[int]] = {}
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if end > start:
            same.setdefault((frame[start:end].tobytes(), rank[start:end].tobytes()), []).append(start)
    groups = []
    for (structure, _), starts in same.items():
        first, length = starts[0], len(structure) // 4
        side_by_side = starts == list(range(first, first + length * len(starts), length))
        index = None if side_by_side else torch.tensor(starts)[:, None] + torch.arange(length)
        f, r = (torch.from_numpy(x[first : first + length]) for x in (frame, rank))
        groups.append(_Group(first, len(starts), length, index, f, r, _blocks(f, r, mask, cross)))
    return groups


def _blocks(frame, rank, mask, cross) -> list[_Block]:
    by_part = mask == MASKS.index("frame_causal_prefix")
    by_frame = by_part or mask == MASKS.index("frame_causal")
    layout = SequenceLayout.from_codes([_frames_of(frame, rank)], mask, cross)
    q_tiles, k_ptr, k_tiles = layout.plan(0 if by_frame else BLOCK_ROWS, 0 if by_frame else BLOCK_ROWS)
    blocks = []
    for i, (_, q0, q1, _) in enumerate(q_tiles.tolist()):
        keys = k_tiles[k_ptr[i] : k_ptr[i + 1]]
        k0, k1 = int(keys[0, 0]), int(keys[-1, 1])
        full = bool(keys[:, 2].all()) and int((keys[:, 1] - keys[:, 0]).sum()) == k1 - k0
        blocks.append(_Block(q0, q1, k0, k1, not full))
    return blocks if by_part else _merge(blocks)


def _merge(blocks: list[_Block]) -> list[_Block]:
    # neighbours that see the same keys in full are one block
    merged: list[_Block] = []
    for b in blocks:
        last = merged[-1] if merged else None
        if last and not (last.partial or b.partial) and (last.q1, last.k0, last.k1) == (b.q0, b.k0, b.k1):
            merged[-1] = last._replace(q1=b.q1)
        else:
            merged.append(b)
    return merged


def _frames_of(frame: torch.Tensor, rank: torch.Tensor) -> list[tuple[int, int]]:
    count = int(frame[-1]) + 1
    prefix = torch.bincount(frame[rank < 0], minlength=count)
    suffix = torch.bincount(frame[rank >= 0], minlength=count)
    return list(zip(prefix.tolist(), suffix.tolist(), strict=True))


def _take(x: torch.Tensor, group: _Group) -> torch.Tensor:
    # packed [total, H, ...] -> [batch, H, n, ...]
    if group.index is None:
        x = x[group.start : group.start + group.batch * group.length]
        return x.unflatten(0, (group.batch, group.length)).transpose(1, 2)
    return x[group.index].transpose(1, 2)


def _put(out: torch.Tensor, group: _Group, rows: slice, value: torch.Tensor) -> None:
    # value [batch, H, n, ...] into rows of every sequence of the group
    value = value.transpose(1, 2).to(out.dtype)
    if group.index is None:
        view = out[group.start : group.start + group.batch * group.length].unflatten(0, (group.batch, group.length))
        view[:, rows] = value
    else:
        out[group.index[:, rows]] = value


def _block_mask(group, block, mask, cross, device) -> torch.Tensor | None:
    if not block.partial:
        return None
    index = torch.arange(group.length)
    q, k = slice(block.q0, block.q1), slice(block.k0, block.k1)
    seen = visible(
        MASKS[mask], tuple(cross), index[q], group.frame[q], group.rank[q], index[k], group.frame[k], group.rank[k]
    )
    return seen.to(device)


def _weight(key_log_weight, group, block) -> torch.Tensor | None:
    # [batch, 1, 1, keys]
    if key_log_weight is None:
        return None
    return _take(key_log_weight[:, None], group)[:, :, None, block.k0 : block.k1]


def attention_cpu(q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, scale, out, lse) -> None:
    """Blocks of rows that see (nearly) the same keys, through torch's SDPA: never a dense N x N mask."""
    gqa = q.shape[1] != k.shape[1]
    out[int(cu_seqlens[-1]) :] = 0
    if lse is not None:
        lse[int(cu_seqlens[-1]) :] = float("-inf")
    for group in _groups(cu_seqlens, frame, rank, mask, cross):
        gq, gk, gv = (_take(x, group) for x in (q, k, v))
        for block in group.blocks:
            rows, keys = slice(block.q0, block.q1), slice(block.k0, block.k1)
            seen = _block_mask(group, block, mask, cross, q.device)
            weight = _weight(key_log_weight, group, block)
            bias = seen
            if weight is not None:
                bias = weight.expand(-1, -1, block.q1 - block.q0, -1)
                bias = bias if seen is None else bias.masked_fill(~seen, float("-inf"))
            bq, bk, bv = gq[:, :, rows], gk[:, :, keys], gv[:, :, keys]
            o = F.scaled_dot_product_attention(bq, bk, bv, attn_mask=bias, scale=scale, enable_gqa=gqa)
            _put(out, group, rows, o)
            if lse is not None:
                _put(lse, group, rows, torch.logsumexp(_scores(bq, bk, scale, seen, weight), -1))


def attention_reference(q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, scale, out, lse) -> None:
    layout = _rebuild(cu_seqlens, frame, rank, mask, cross)
    o, s = attention_ref(q, k, v, layout, softmax_scale=scale, key_log_weight=key_log_weight, return_lse=True)
    out.copy_(o)
    if lse is not None:
        lse.copy_(s)


def _rebuild(cu_seqlens, frame, rank, mask, cross) -> SequenceLayout:
    bounds = cu_seqlens.tolist()
    frames = [_frames_of(frame[a:b].cpu(), rank[a:b].cpu()) if b > a else [] for a, b in itertools.pairwise(bounds)]
    return SequenceLayout.from_codes(frames, mask, cross, frame.device)


def attention_backward_blocks(grad_out, q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, scale):
    """dV = P^T dO, dS = P (dP - rowsum(dP P)), dQ = scale dS K, dK = scale dS^T Q, block by block.

    A block holds all keys its rows see, so P is recomputed without a saved lse. Products take operands in q's dtype,
    softmax and sums over blocks are float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = tuple(torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for group in _groups(cu_seqlens, frame, rank, mask, cross):
        operands = tuple(_take(x, group) for x in (q, k, v, grad_out))
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in operands[:3])
        for block in group.blocks:
            rows, keys = slice(block.q0, block.q1), slice(block.k0, block.k1)
            seen, weight = _block_mask(group, block, mask, cross, q.device), _weight(key_log_weight, group, block)
            bq, bk, bv, bo = (x[:, :, s] for x, s in zip(operands, (rows, keys, keys, rows), strict=True))
            dq[:, :, rows], block_dk, block_dv = _block_backward(bq, bk, bv, bo, seen, weight, scale)
            dk[:, :, keys] += block_dk
            dv[:, :, keys] += block_dv
        for grad, value in zip(grads, (dq, dk, dv), strict=True):
            _put(grad, group, slice(None), value)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


def _block_backward(q, k, v, grad_out, seen, weight, scale):
    heads = q.shape[1] // k.shape[1]
    if heads > 1:
        k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = scale * _widen(q @ k.transpose(-1, -2))
    if weight is not None:
        scores = scores + weight
    p = _softmax(scores.masked_fill(~seen, float("-inf"))) if seen is not None else torch.softmax(scores, -1)
    dp = _widen(grad_out @ v.transpose(-1, -2))
    ds = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p).mul_(scale).to(q.dtype)
    dk, dv = ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ grad_out
    if heads > 1:
        dk, dv = (x.unflatten(1, (-1, heads)).sum(2) for x in (dk, dv))
    return ds @ k, dk, dv


def _attention(q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, softmax_scale, return_lse):
    # elsewhere looking at values would wait for the device
    if key_log_weight is not None and key_log_weight.device.type == "cpu" and not key_log_weight.isfinite().all():
        checks.reject("key_log_weight", "be finite", "NaN or infinity")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    library.launch("attention", q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, softmax_scale, out, lse)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _attention_fake(q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, softmax_scale, return_lse):
    lse_shape = q.shape[:2] if return_lse else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse_shape, dtype=torch.float32)


def _backward_fake(grad_out, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, frame, rank, key_log_weight, mask, cross, scale, _ = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, frame, rank, key_log_weight)
    ctx.rest = (mask, cross, scale)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _grad_lse):
    grads = torch.ops.flexkernels.attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *[None] * 8)


library.define("attention", SCHEMA, _attention, _attention_fake)
library.define("attention_backward", BACKWARD_SCHEMA, attention_backward_blocks, _backward_fake)
library.define_autograd("attention", _backward, _setup_context)
library.register("attention", "reference", attention_reference)
library.register("attention", "cpu", attention_cpu)

"""Structured variable-length attention over packed sequences.

    S = softmax_scale * q k^T + key_log_weight,  P = softmax(S over visible keys),  out = P v,  lse = logsumexp(S)

``key_log_weight`` log(m) makes a key count as m identical keys. Shapes follow flash-attention's varlen convention.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from . import checks, legacy
from .attention_backward import attention_backward_blocks, frames_of
from .layout import MASKS, LayoutTensors, SequenceLayout, plan_tiles

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] layout, Tensor? key_log_weight, int mask, int[] cross, "
    "float softmax_scale) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] layout, Tensor? key_log_weight, "
    "int mask, int[] cross, float softmax_scale) -> (Tensor, Tensor, Tensor)"
)


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
    """Attention over a packed batch under a :class:`SequenceLayout`.

    Args:
        q: ``[total, heads, head_dim]`` float32, bfloat16 or float16, head_dim 1 to 256; may be a strided view.
        k, v: ``[total_k, kv_heads, head_dim]``, heads a multiple of kv_heads (grouped-query attention).
        layout: built for exactly these tokens. Rows beyond ``layout.total`` are allowed and give zeros; so are keys
            beyond ``layout.total_k``, which no query sees.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        key_log_weight: float32 ``[total_k]``, finite (checked on the CPU alone), added to every logit of that key; no
            gradient flows to it.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out ``[total, heads, head_dim]`` in q's dtype; with ``return_lse`` also lse, float32 ``[total, heads]``
        (-inf for a row that sees nothing, whose out is 0), through which no gradient flows.

    The result of a sequence does not depend on what stands beside it, and repeats bit by bit, forward and backward.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape, or a layout for other lengths, before any launch.
    """
    _check(q, k, v, layout, key_log_weight)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else checks.finite("softmax_scale", softmax_scale)
    mask = MASKS.index(layout.mask)
    out, lse = torch.ops.flexkernels.attention(q, k, v, layout.tensors, key_log_weight, mask, layout.cross, scale)
    return (out, lse) if return_lse else out


def attention_ref(q, k, v, layout, *, softmax_scale=None, key_log_weight=None, return_lse=False):
    """The specification of :func:`attention`: dense scores, float32 arithmetic (float64 stays float64)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    heads = q.shape[1] // k.shape[1]
    seen = F.pad(layout.visible(), (0, len(k) - layout.total_k, 0, len(q) - layout.total))
    wide_q, wide_k, wide_v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    wide_k, wide_v = wide_k.repeat_interleave(heads, 1), wide_v.repeat_interleave(heads, 1)
    scores = scale * (wide_q.transpose(0, 1) @ wide_k.permute(1, 2, 0))
    if key_log_weight is not None:
        scores = scores + key_log_weight
    scores = scores.masked_fill(~seen, float("-inf"))
    # a row that sees nothing is all -inf: zeros instead of NaN
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    out = (weights @ wide_v.transpose(0, 1)).transpose(0, 1).to(q.dtype)
    return (out, torch.logsumexp(scores, -1).T) if return_lse else out


def _check(q, k, v, layout, key_log_weight) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, checks.FLOATS, 3)
        checks.same_device(name, x, "layout", layout)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        checks.reject("k and v", f"be {checks.short(q.dtype)} like q", f"{k.dtype} and {v.dtype}", TypeError)
    checks.shape("v", v, k.shape, " of k")
    if k.shape[2] != q.shape[2]:
        checks.reject("k", f"have head_dim {q.shape[2]} like q", f"shape {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        checks.reject("q", f"have a multiple of k's {k.shape[1]} heads", f"{q.shape[1]} heads")
    if not 1 <= q.shape[2] <= 256:
        checks.reject("head_dim", "lie between 1 and 256", q.shape[2])
    if len(q) < layout.total:
        checks.reject("q", f"have at least the layout's {layout.total} rows", f"{len(q)} rows")
    if len(k) < layout.total_k:
        checks.reject("k", f"have at least the layout's {layout.total_k} rows", f"{len(k)} rows")
    if key_log_weight is not None:
        checks.tensor("key_log_weight", key_log_weight, (torch.float32,), 1)
        checks.shape("key_log_weight", key_log_weight, k.shape[:1])
        checks.same_device("key_log_weight", key_log_weight, "layout", layout)


def attention_reference(q, k, v, layout, key_log_weight, mask, cross, scale, out, lse) -> None:
    made = _rebuild(LayoutTensors(*layout), mask, cross)
    o, s = attention_ref(q, k, v, made, softmax_scale=scale, key_log_weight=key_log_weight, return_lse=True)
    out.copy_(o)
    lse.copy_(s)


def _rebuild(t: LayoutTensors, mask, cross) -> SequenceLayout:
    sides = ((t.cu_seqlens, t.frame, t.rank), (t.cu_seqlens_k, t.frame_k, t.rank_k))
    queries, keys = ([frames_of(f[a:b], r[a:b]) for a, b in pairwise(c.tolist())] for c, f, r in sides)
    return SequenceLayout.from_codes(queries, mask, cross, t.frame.device, keys)


def attention_cpu(q, k, v, layout, key_log_weight, mask, cross, scale, out, lse) -> None:
    t = LayoutTensors(*layout)
    sides = (t.cu_seqlens, t.cu_seqlens_k, t.frame, t.rank, t.frame_k, t.rank_k)
    plan = (t.tiles, t.ptr, t.runs)
    torch.ops.flexkernels_native.attention_forward(q, k, v, *sides, *plan, key_log_weight, mask, cross, scale, out, lse)


def attention_backward_cpu(grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, scale, dq, dk, dv) -> None:
    t = LayoutTensors(*layout)
    sides = (t.cu_seqlens, t.cu_seqlens_k, t.frame, t.rank, t.frame_k, t.rank_k)
    plan = (t.tiles, t.ptr, t.runs)
    torch.ops.flexkernels_native.attention_backward(
        grad_out, q, k, v, *sides, *plan, key_log_weight, mask, cross, scale, out, lse, dq, dk, dv
    )


def attention_triton(q, k, v, layout, key_log_weight, mask, cross, scale, out, lse) -> None:
    from .triton import attention as kernels

    t = LayoutTensors(*layout)
    # rows of no tile
    out[len(t.frame) :] = 0
    lse[len(t.frame) :] = float("-inf")
    kernels.attention_triton(
        q, k, v, *_metadata(t), t.tiles, t.ptr, t.runs, key_log_weight, mask, cross, scale, out, lse,
        rows=plan_tiles(q.device).rows,
    )  # fmt: skip


def attention_backward_triton(
    grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, scale, dq, dk, dv
) -> None:
    from .triton import attention as kernels

    t = LayoutTensors(*layout)
    for grad, used in ((dq, t.frame), (dk, t.frame_k), (dv, t.frame_k)):
        grad[len(used) :] = 0
    kernels.attention_backward_triton(
        grad_out, q, k, v, out, lse, *_metadata(t), t.tiles, t.ptr, t.runs, t.key_tiles, t.key_ptr, t.key_runs,
        key_log_weight, mask, cross, scale, dq, dk, dv, rows=plan_tiles(q.device).rows,
    )  # fmt: skip


def _metadata(t: LayoutTensors) -> tuple[torch.Tensor, ...]:
    return t.frame, t.rank, t.frame_k, t.rank_k, t.cu_seqlens, t.cu_seqlens_k


def _backward_unsupported(grad_out, q, *_) -> str | None:
    if q.dtype == torch.float32 and q.shape[-1] > 64:
        return "the float32 gradient of head_dim above 64 does not fit into registers"
    return None


def _attention(q, k, v, layout, key_log_weight, mask, cross, softmax_scale):
    # elsewhere looking at values would wait for the device
    if key_log_weight is not None and key_log_weight.device.type == "cpu" and not key_log_weight.isfinite().all():
        checks.reject("key_log_weight", "be finite", "NaN or infinity")
    out, lse = _attention_fake(q, k, v, layout, key_log_weight, mask, cross, softmax_scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    legacy.launch("attention", q, k, v, layout, key_log_weight, mask, cross, softmax_scale, out, lse)
    return out, lse


def _attention_fake(q, k, v, layout, key_log_weight, mask, cross, softmax_scale):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _attention_backward(grad_out, q, k, v, *rest):
    grads = _backward_fake(grad_out, q, k, v)
    grad_out, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, q, k, v))
    legacy.launch("attention_backward", grad_out, q, k, v, *rest, *grads)
    return grads


def _backward_fake(grad_out, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, layout, key_log_weight, mask, cross, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, key_log_weight, *layout)
    ctx.rest = (mask, cross, scale)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_out, _grad_lse):
    q, k, v, out, lse, key_log_weight, *layout = ctx.saved_tensors
    grads = torch.ops.flexkernels.attention_backward(grad_out, q, k, v, out, lse, layout, key_log_weight, *ctx.rest)
    return (*grads, [None] * len(layout), None, None, None, None)


legacy.define("attention", SCHEMA, _attention, _attention_fake)
legacy.define("attention_backward", BACKWARD_SCHEMA, _attention_backward, _backward_fake)
legacy.define_autograd("attention", _backward, _setup_context)
legacy.register("attention", "reference", attention_reference)
legacy.register("attention", "cpu", attention_cpu)
legacy.register("attention", "triton", attention_triton)
legacy.register("attention_backward", "reference", attention_backward_blocks)
legacy.register("attention_backward", "cpu", attention_backward_cpu)
legacy.register("attention_backward", "triton", attention_backward_triton, _backward_unsupported)

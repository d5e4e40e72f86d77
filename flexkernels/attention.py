"""Structured variable-length attention over packed sequences.

    S = softmax_scale * q k^T + key_log_weight,  P = softmax(S over visible keys),  out = P v,  lse = logsumexp(S)

``key_log_weight`` log(m) makes a key count as m identical keys. Shapes follow flash-attention's varlen convention.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F

from . import checks, library
from .attention_backward import attention_backward_blocks
from .layout import MASKS, NO_KEY, LayoutTensors, SequenceLayout, visible_tokens
from .typed import as_typed

MAX_HEAD_DIM = 256
# of the CUDA kernel
MAX_CUDA_HEAD_DIM = 128


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, *, softmax_scale: float | None = ...,
    key_log_weight: torch.Tensor | None = ..., return_lse: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, *, softmax_scale: float | None = ...,
    key_log_weight: torch.Tensor | None = ..., return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, *, softmax_scale: float | None = ...,
    key_log_weight: torch.Tensor | None = ..., return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
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
            gradient flows to it. Of a layout with weighted_keys, 0 at all other keys and never negative.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out ``[total, heads, head_dim]`` in q's dtype; with ``return_lse`` also lse, float32 ``[total, heads]``
        (-inf for a row that sees nothing, whose out is 0), through which no gradient flows.

    The result of a sequence does not depend on what stands beside it, and repeats bit by bit, forward and backward.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape, or a layout for other lengths, before any launch.
    """
    out, lse = _attention_op(q, k, v, layout.arguments[0], key_log_weight, *layout.arguments[1:], softmax_scale)
    return (out, lse.T) if return_lse else out


@as_typed(attention)
def attention_ref(q, k, v, layout, *, softmax_scale=None, key_log_weight=None, return_lse=False):
    """The specification of :func:`attention`: dense scores, float32 arithmetic (float64 stays float64)."""
    out, lse = _attend(q, k, v, layout.visible(), key_log_weight, softmax_scale)
    return (out, lse.T) if return_lse else out


def _attend(q, k, v, seen, key_log_weight, softmax_scale):
    """out like q and lse [heads, total]; seen: bool, which tokens see which, of those that the layout holds."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads = q.shape[1] // k.shape[1]
    seen = F.pad(seen, (0, len(k) - seen.shape[1], 0, len(q) - seen.shape[0]))
    wide_q, wide_k, wide_v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    wide_k, wide_v = wide_k.repeat_interleave(heads, 1), wide_v.repeat_interleave(heads, 1)
    scores = scale * (wide_q.transpose(0, 1) @ wide_k.permute(1, 2, 0))
    if key_log_weight is not None:
        scores = scores + key_log_weight
    scores = scores.masked_fill(~seen, float("-inf"))
    # a row that sees nothing is all -inf: zeros instead of NaN
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (weights @ wide_v.transpose(0, 1)).transpose(0, 1).to(q.dtype), torch.logsumexp(scores, -1)


# validation


def _check_attention(q, k, v, layout, key_log_weight, mask, cross, softmax_scale):
    t = LayoutTensors(*layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, checks.FLOATS, 3)
        checks.same_device(name, x, "layout", t.frame)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        checks.reject("k and v", f"be {checks.short(q.dtype)} like q", f"{k.dtype} and {v.dtype}", TypeError)
    checks.shape("v", v, k.shape, " of k")
    if k.shape[2] != q.shape[2]:
        checks.reject("k", f"have head_dim {q.shape[2]} like q", f"shape {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        checks.reject("q", f"have a multiple of k's {k.shape[1]} heads", f"{q.shape[1]} heads")
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        checks.reject("head_dim", f"lie between 1 and {MAX_HEAD_DIM}", q.shape[2])
    for name, x, tokens in (("q", q, t.frame), ("k", k, t.frame_k)):
        if len(x) < len(tokens):
            checks.reject(name, f"have at least the layout's {len(tokens)} rows", f"{len(x)} rows")
    if softmax_scale is not None:
        checks.finite("softmax_scale", softmax_scale)
    if key_log_weight is not None:
        checks.tensor("key_log_weight", key_log_weight, (torch.float32,), 1)
        checks.shape("key_log_weight", key_log_weight, k.shape[:1])
        checks.same_device("key_log_weight", key_log_weight, "layout", t.frame)
        checks.all_finite("key_log_weight", key_log_weight)
        _check_weighted(key_log_weight, t.weighted)


def _check_weighted(key_log_weight, weighted):
    """Against a layout that lists its weighted keys; looks at the values as `checks.all_finite` does."""
    if weighted.device.type != "cpu" or torch.compiler.is_compiling() or weighted.shape[1] == 0:
        return
    elsewhere = key_log_weight.index_fill(0, weighted[weighted != NO_KEY].long(), 0.0)
    if (elsewhere != 0).any() or (key_log_weight < 0).any():
        checks.reject("key_log_weight", "be 0 but at the layout's weighted_keys, and not negative", "other weights")


def _check_attention_backward(grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, softmax_scale):
    """Of tensors that autograd hands on: what C++ says of them is enough."""


# reference, shapes, gradient


def _attention_reference(q, k, v, layout, key_log_weight, mask, cross, softmax_scale):
    return _attend(q, k, v, visible_tokens(LayoutTensors(*layout), MASKS[mask], cross), key_log_weight, softmax_scale)


def _attention_fake(q, k, v, layout, key_log_weight, mask, cross, softmax_scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _attention_backward_fake(grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, softmax_scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, layout, key_log_weight, *ctx.rest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, key_log_weight, *layout)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_out, _grad_lse):
    q, k, v, out, lse, key_log_weight, *layout = ctx.saved_tensors
    grads = _attention_backward_op(grad_out, q, k, v, out, lse, layout, key_log_weight, *ctx.rest)
    return (*grads, None, None, None, None, None)


# ops; Triton was measured faster on GPUs, where it is; the gradient has no CUDA kernel

_ARGUMENTS = "Tensor[] layout, Tensor? key_log_weight, int mask, int[] cross, float? softmax_scale"


def _too_many_registers(grad_out, q, *rest) -> str | None:
    if q.dtype == torch.float32 and q.shape[-1] > 128:
        return "the float32 gradient of head_dim above 128 does not fit into registers"
    return None


def _not_on_tensor_cores(q, *rest) -> str | None:
    if q.dtype == torch.float32:
        return "its kernel takes bfloat16 and float16, not float32"
    if q.shape[-1] > MAX_CUDA_HEAD_DIM:
        return f"its kernel takes head_dim up to {MAX_CUDA_HEAD_DIM}, not {q.shape[-1]}"
    return None


_attention_op = library.Op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
    check=_check_attention,
    reference=_attention_reference,
    fake=_attention_fake,
    triton="attention",
    cuda_order=("triton", "cuda"),
    unsupported={"cuda": _not_on_tensor_cores},
    setup_context=_setup,
    backward=_backward,
)
_attention_backward_op = library.Op(
    "attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check_attention_backward,
    reference=attention_backward_blocks,
    fake=_attention_backward_fake,
    triton="attention_backward",
    unsupported={"triton": _too_many_registers},
    # by blocks, in place; attention itself has one, also of its gradient
    jvp=None,
    cuda_order=("triton",),
)

"""Query and key heads normalised and rotated: `qk_norm`, its gradient, and the formula that `kv_append_` shares.

    norm:    x_hat = (x - mean) / sqrt(var + eps) ("layer") or x / sqrt(mean(x**2) + eps) ("rms"), y = weight * x_hat
    rotary:  z[:half] = y[:half] cos - y[half:] sin,  z[half:] = y[half:] cos + y[:half] sin

The rotary embedding pairs channel i with channel i + head_dim / 2 (the half-split, "neox" convention).
"""

from __future__ import annotations

import torch

from . import checks, library
from .typed import as_typed

MAX_HEAD_DIM = 256
# by what the ops call them
NORMS = (None, "layer", "rms")


def qk_norm(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int | None = None,
    *,
    norm: str | None = "layer",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of a merged projection, q and k normalised per head and rotated, in one pass; differentiable.

    qkv: [total, (heads + 2 * kv_heads) * head_dim] float32, bfloat16 or float16, head_dim from 1 to 256; the rows may
    be strided. kv_heads: default heads.
    norm, q_weight, k_weight, eps: as for `kv_append_`; the arithmetic is that of float32.
    rope, positions: (cos, sin), float32 [rows, head_dim / 2], and int32 [total], the table row of each token; both or
    neither. No gradient flows to the tables.

    Returns q [total, heads, head_dim], k [total, kv_heads, head_dim], and v, a view of qkv. An empty qkv gives empty
    results. Weight gradients are sums over fixed chunks of tokens, so they repeat bit for bit.

    Raises TypeError or ValueError for a wrong dtype, device, shape or number. A position outside the table raises
    ValueError on the CPU; elsewhere it is not looked for and is moved to the nearest row.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim = check_merged(qkv, 2, heads, kv_heads)
    cos, sin = angles(rope)
    # a split's gradient is one concatenation, that of two slices would be two padded copies and a sum
    qk, v = qkv.split([(heads + kv_heads) * head_dim, kv_heads * head_dim], 1)
    q, k = _qk_norm_op(qk, heads, kv_heads, code_of(norm), q_weight, k_weight, eps, cos, sin, positions)
    return q, k, v.unflatten(1, (kv_heads, head_dim))


@as_typed(qk_norm)
def qk_norm_ref(
    qkv,
    heads,
    kv_heads=None,
    *,
    norm="layer",
    q_weight=None,
    k_weight=None,
    eps=1e-5,
    rope=None,
    positions=None,
):
    """The specification of `qk_norm` in plain PyTorch, differentiable by itself (float64 stays float64)."""
    kv_heads = heads if kv_heads is None else kv_heads
    split = [heads, kv_heads, kv_heads]
    q, k, v = qkv.unflatten(1, (sum(split), qkv.shape[1] // sum(split))).split(split, 1)
    tables = rows_of(*angles(rope), positions)
    return norm_rotate(q, norm, q_weight, eps, tables), norm_rotate(k, norm, k_weight, eps, tables), v


def norm_rotate(x, norm, weight, eps, tables):
    # x [..., heads, head_dim], tables [..., head_dim / 2]
    y = widen(x)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if tables is not None:
        cos, sin = (table.unsqueeze(-2) for table in tables)
        low, high = y.chunk(2, -1)
        y = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    return y.to(x.dtype)


def rows_of(cos, sin, positions):
    """The tables' rows at these positions, each moved into the table; None without a rotary embedding."""
    if cos is None:
        return None
    return [table[positions.long().clamp(0, len(table) - 1)] for table in (cos, sin)]


def widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def code_of(norm: str | None) -> int:
    if norm not in NORMS:
        checks.reject("norm", "be None, 'layer' or 'rms'", repr(norm))
    return NORMS.index(norm)


def angles(rope):
    """cos and sin, or None twice."""
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        checks.reject("rope", "be a pair (cos, sin)", type(rope).__name__, TypeError)
    return rope


# validation


def check_merged(qkv, ndim, heads, kv_heads) -> int:
    """head_dim of a merged projection."""
    checks.tensor("qkv", qkv, checks.FLOATS, ndim)
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if isinstance(count, bool) or not isinstance(count, int):
            checks.reject(name, "be an int", type(count).__name__, TypeError)
        if count < 1:
            checks.reject(name, "be at least 1", count)
    head_dim, rest = divmod(qkv.shape[-1], heads + 2 * kv_heads)
    if rest or not 1 <= head_dim <= MAX_HEAD_DIM:
        must = f"have (heads + 2 * kv_heads) * head_dim columns, {heads + 2 * kv_heads} times 1 to {MAX_HEAD_DIM}"
        checks.reject("qkv", must, qkv.shape[-1])
    return head_dim


def check_norm(norm, q_weight, k_weight, eps, cos, sin, x, head_dim):
    """What `kv_append_` and `qk_norm` have in common; norm is its code."""
    checks.at_least("eps", eps, 0)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        if NORMS[norm] is None:
            checks.reject(name, "be None without a norm", "a tensor")
        checks.tensor(name, weight, checks.FLOATS, 1)
        checks.shape(name, weight, (head_dim,))
        checks.same_device(name, weight, "qkv", x)
    if cos is None:
        return
    if head_dim % 2:
        checks.reject("head_dim", "be even for a rotary embedding", head_dim)
    checks.tensor("cos", cos, (torch.float32,), 2)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(name, table, (torch.float32,), 2)
        checks.shape(name, table, (cos.shape[0], head_dim // 2))
        checks.same_device(name, table, "qkv", x)
    if cos.shape[0] == 0:
        checks.reject("rope", "have at least 1 row", 0)


def _check_qk_norm(qk, heads, kv_heads, norm, q_weight, k_weight, eps, cos, sin, positions):
    check_norm(norm, q_weight, k_weight, eps, cos, sin, qk, qk.shape[1] // (heads + kv_heads))
    if (positions is None) != (cos is None):
        checks.reject("rope and positions", "be given together", "one of them")
    if positions is None:
        return
    checks.tensor("positions", positions, (torch.int32,), 1)
    checks.shape("positions", positions, qk.shape[:1])
    checks.same_device("positions", positions, "qkv", qk)
    checks.in_range("positions", positions, 0, cos.shape[0] - 1)


def _check_qk_norm_backward(grad_q, grad_k, qk, norm, q_weight, k_weight, eps, cos, sin, positions):
    """Of tensors that autograd hands on: what C++ says of them is enough."""


# references


def _qk_norm_reference(qk, heads, kv_heads, norm, q_weight, k_weight, eps, cos, sin, positions):
    # sums over strided columns would have other bits
    q, k = qk.contiguous().unflatten(1, (heads + kv_heads, -1)).split([heads, kv_heads], 1)
    tables = rows_of(cos, sin, positions)
    return norm_rotate(q, NORMS[norm], q_weight, eps, tables), norm_rotate(k, NORMS[norm], k_weight, eps, tables)


def _qk_norm_backward_reference(grad_q, grad_k, qk, norm, q_weight, k_weight, eps, cos, sin, positions):
    # [total, heads + kv_heads, head_dim]
    dy = widen(torch.cat([grad_q, grad_k], 1))
    if cos is not None:
        c, s = (table[:, None] for table in rows_of(cos, sin, positions))
        low, high = dy.chunk(2, -1)
        dy = torch.cat([low * c + high * s, high * c - low * s], -1)
    x_hat = widen(qk.unflatten(1, dy.shape[1:]))
    if NORMS[norm] == "layer":
        x_hat = x_hat - x_hat.mean(-1, keepdim=True)
    rstd = 1 if NORMS[norm] is None else torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
    x_hat = x_hat * rstd
    heads = (grad_q.shape[1], grad_k.shape[1])
    grad_weight = torch.stack([part.sum((0, 1)) for part in (dy * x_hat).split(heads, 1)])
    ones = dy.new_ones(dy.shape[2])
    weights = (ones if weight is None else weight for weight in (q_weight, k_weight))
    dx = torch.cat([part * weight for part, weight in zip(dy.split(heads, 1), weights, strict=True)], 1)
    if NORMS[norm] is not None:
        mean = dx.mean(-1, keepdim=True) if NORMS[norm] == "layer" else 0
        dx = dx - x_hat * (dx * x_hat).mean(-1, keepdim=True) - mean
    grad_qk = (dx * rstd).flatten(1).to(qk.dtype)
    return grad_qk, grad_weight[: _weight_rows(q_weight, k_weight)]


def _weight_rows(q_weight, k_weight) -> int:
    # without weights their gradient is empty: an op cannot return None
    return 0 if q_weight is None and k_weight is None else 2


# shapes


def _qk_norm_fake(qk, heads, kv_heads, *_):
    head_dim = qk.shape[1] // (heads + kv_heads)
    return qk.new_empty((qk.shape[0], heads, head_dim)), qk.new_empty((qk.shape[0], kv_heads, head_dim))


def _qk_norm_backward_fake(grad_q, grad_k, qk, norm, q_weight, k_weight, *_):
    rows = _weight_rows(q_weight, k_weight)
    return qk.new_empty(qk.shape), qk.new_empty((rows, grad_q.shape[2]), dtype=torch.float32)


# gradients


def _setup(ctx, inputs, output):
    qk, _, _, ctx.norm, q_weight, k_weight, ctx.eps, *tables = inputs
    ctx.save_for_backward(qk, q_weight, k_weight, *tables)


def _backward(ctx, grad_q, grad_k):
    qk, q_weight, k_weight, *tables = ctx.saved_tensors
    grad_qk, grad_weight = _qk_norm_backward_op(grad_q, grad_k, qk, ctx.norm, q_weight, k_weight, ctx.eps, *tables)
    grads = [None if w is None else grad_weight[i].to(w.dtype) for i, w in enumerate((q_weight, k_weight))]
    return grad_qk, None, None, None, *grads, None, None, None, None


# ops; on an H200 Triton's are the faster ones


_qk_norm_op = library.Op(
    "qk_norm",
    "(Tensor qk, int heads, int kv_heads, int norm, Tensor? q_weight, Tensor? k_weight, float eps, Tensor? cos, "
    "Tensor? sin, Tensor? positions) -> (Tensor, Tensor)",
    check=_check_qk_norm,
    reference=_qk_norm_reference,
    fake=_qk_norm_fake,
    triton="head_norm",
    cuda_order=("triton", "cuda"),
    setup_context=_setup,
    backward=_backward,
)
_qk_norm_backward_op = library.Op(
    "qk_norm_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor qk, int norm, Tensor? q_weight, Tensor? k_weight, float eps, Tensor? cos, "
    "Tensor? sin, Tensor? positions) -> (Tensor, Tensor)",
    check=_check_qk_norm_backward,
    reference=_qk_norm_backward_reference,
    fake=_qk_norm_backward_fake,
    triton="head_norm",
    cuda_order=("triton", "cuda"),
)

"""Norms between residual blocks with their modulation and residual fused in, and SwiGLU; each with its reference.

Per row, with s = segment[row], the row of the modulation tables that the token takes (never expanded to tokens):
    sum = x + gate[s] * y
    out = LN(sum) * (1 + scale[s]) + shift[s],   or   sum / rms(sum) * weight
Everything is float32 inside and rounded once at each result; out follows from the rounded sum, as it does where the
two are computed one after the other.

Gradients of the tables are sums over the rows of each segment, added in a fixed order, so they repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, overload

import torch

from . import checks, library, norm_math
from .norm_math import GRAD_GATE, GRAD_SCALE, GRAD_SHIFT, GRAD_Y, NARROW_SUMS, residual_sum
from .typed import as_typed

# a Triton block holds a row in registers
MAX_WIDTH = 8192
REFERENCE_FLOATS = (*checks.FLOATS, torch.float64)


def adaln_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """LN(x) * (1 + scale[segment]) + shift[segment], with a layer norm that has no parameters; differentiable.

    x: [n, d] float32, bfloat16 or float16; rows may lie any stride apart.
    shift, scale: [S, d] in x's dtype or float32, either or both; also views into a wider table, [S, 6 * d] say.
    segment: int32 [n], the table row of each row, from 0 to S - 1; not needed where the tables have one row or are
        absent.
        On the CPU a value outside raises; elsewhere it is clamped, since looking would wait for the device.

    Returns [n, d] in x's dtype, contiguous; empty for an empty x. Statistics and arithmetic are float32.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers.
    Source: adaptive layer norm of arXiv 2212.09748, section 3.2.
    """
    return _adaln_norm_op(x, shift, scale, segment, eps)


def adaln_norm_ref(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The specification of `adaln_norm` in plain, differentiable PyTorch; it takes float64 too and then computes so."""
    _check_adaln_norm(x, shift, scale, segment, eps, REFERENCE_FLOATS)
    return norm_math.layer_norm(x, shift, scale, segment, eps)


def gated_residual_adaln_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_new = x + gate[segment] * y and adaln_norm(x_new, shift, scale, segment), in one pass; differentiable.

    x, y: [n, d] of one dtype. gate: [S, d] like shift and scale, perhaps of another table, or None for x + y.
    Everything else as in `adaln_norm`. Returns (x_new, normed), both [n, d] in x's dtype; normed is that of the rounded
    x_new.
    """
    return _gated_residual_adaln_norm_op(x, y, gate, shift, scale, segment, eps)


def gated_residual_adaln_norm_ref(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `gated_residual_adaln_norm` in plain PyTorch; it takes float64 too."""
    _check_gated_residual_adaln_norm(x, y, gate, shift, scale, segment, eps, REFERENCE_FLOATS)
    x_new = residual_sum(x, y, gate, segment)
    return x_new, norm_math.layer_norm(x_new, shift, scale, segment, eps)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, segment: torch.Tensor | None = None
) -> torch.Tensor:
    """x + gate[segment] * y, [n, d] in x's dtype; arguments as in `gated_residual_adaln_norm`; differentiable."""
    return _gated_residual_op(x, y, gate, segment)


def gated_residual_ref(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, segment: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification of `gated_residual` in plain PyTorch; it takes float64 too."""
    _check_gated_residual(x, y, gate, segment, REFERENCE_FLOATS)
    return residual_sum(x, y, gate, segment)


@overload
def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = ..., residual: None = ...) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = ..., residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight; with `residual` of x + residual, which is returned too; differentiable.

    x, residual: [n, d] of one dtype; float32, bfloat16 or float16; rows may lie any stride apart.
    weight: [d] in x's dtype or float32.

    Returns normed [n, d] in x's dtype, or (x + residual, normed) with normed that of the rounded sum. Empty for an
    empty x. Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers.
    Source: arXiv 1910.07467, equation 4.
    """
    total, normed = _rms_norm_op(x, weight, residual, eps)
    return normed if residual is None else (total, normed)


@as_typed(rms_norm)
def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `rms_norm` in plain, differentiable PyTorch; it takes float64 too."""
    _check_rms_norm(x, weight, residual, eps, REFERENCE_FLOATS)
    total = x if residual is None else residual_sum(x, residual, None, None)
    normed = norm_math.root_mean_square_norm(total, weight, eps)
    return normed if residual is None else (total, normed)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(x[:, :h]) * x[:, h:] with silu(a) = a / (1 + exp(-a)); differentiable.

    x: [n, 2 * h] float32, bfloat16 or float16; rows may lie any stride apart.
    Returns [n, h] in x's dtype, rounded once; empty for an empty x. Raises TypeError or ValueError for another dtype or
    shape. Source: arXiv 2002.05202, equation 6 without the projections.
    """
    return _swiglu_op(x)


def swiglu_ref(x: torch.Tensor) -> torch.Tensor:
    """The specification of `swiglu` in plain, differentiable PyTorch; it takes float64 too."""
    _check_swiglu(x, REFERENCE_FLOATS)
    return norm_math.swiglu(x)


# validation


def _check_tables(x, tables: dict[str, torch.Tensor | None], segment, floats):
    checks.tensor("x", x, floats, 2)
    given = {name: table for name, table in tables.items() if table is not None}
    rows = 1
    for name, table in given.items():
        checks.tensor(name, table, tuple(dict.fromkeys((x.dtype, torch.float32))), 2)
        checks.same_device(name, table, "x", x)
        first, other = next(iter(given.items()))
        rows = other.shape[0]
        checks.shape(name, table, (rows, x.shape[1]), "" if name == first else f" of {first}")
    if segment is None:
        if rows != 1:
            checks.reject("segment", f"be given with tables of {rows} rows", "None")
        return
    checks.tensor("segment", segment, (torch.int32,), 1)
    checks.shape("segment", segment, (x.shape[0],))
    checks.same_device("segment", segment, "x", x)
    if rows == 0 and x.shape[0]:
        checks.reject(next(iter(given)), "have at least one row", 0)


def _check_adaln_norm(x, shift, scale, segment, eps, floats=checks.FLOATS):
    _check_tables(x, {"shift": shift, "scale": scale}, segment, floats)
    checks.at_least("eps", eps, 0)


def _check_gated_residual_adaln_norm(x, y, gate, shift, scale, segment, eps, floats=checks.FLOATS):
    _check_tables(x, {"gate": gate, "shift": shift, "scale": scale}, segment, floats)
    _check_like("y", y, x)
    checks.at_least("eps", eps, 0)


def _check_like(name, value, x):
    checks.tensor(name, value, (x.dtype,))
    checks.like(name, value, "x", x)


def _check_gated_residual(x, y, gate, segment, floats=checks.FLOATS):
    checks.tensor("gate", gate)
    _check_tables(x, {"gate": gate}, segment, floats)
    _check_like("y", y, x)


def _check_rms_norm(x, weight, residual, eps, floats=checks.FLOATS):
    checks.tensor("x", x, floats, 2)
    checks.tensor("weight", weight, (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32), 1)
    checks.shape("weight", weight, x.shape[1:])
    checks.same_device("weight", weight, "x", x)
    if residual is not None:
        _check_like("residual", residual, x)
    checks.at_least("eps", eps, 0)


def _check_swiglu(x, floats=checks.FLOATS):
    checks.tensor("x", x, floats, 2)
    if x.shape[1] % 2:
        checks.reject("x", "have the shape [n, 2 * h]", list(x.shape))


def _check_gradients(grad_out, grad_sum, v, y, gate, scale, segment, order, offsets, rows, eps, rms, wanted):
    """Of tensors that autograd hands on: what C++ says of them is enough."""


def _check_swiglu_backward(grad_out, x):
    checks.shape("grad_out", grad_out, (x.shape[0], x.shape[1] // 2))


def _check_segment(segment, *tables):
    """Looks at its values, on the CPU: elsewhere it is clamped."""
    rows = next((table.shape[0] for table in tables if table is not None), None)
    if segment is None or rows is None or segment.device.type != "cpu" or not segment.numel():
        return
    low, high = (int(end) for end in torch.aminmax(segment))
    if low < 0 or high >= rows:
        checks.reject("segment", f"lie between 0 and {rows - 1}", low if low < 0 else high)


# references


def _gated_residual_adaln_norm_reference(x, y, gate, shift, scale, segment, eps):
    total = residual_sum(x, y, gate, segment)
    return total, norm_math.layer_norm(total, shift, scale, segment, eps)


def _rms_norm_reference(x, weight, residual, eps):
    total = x if residual is None else residual_sum(x, residual, None, None)
    normed = norm_math.root_mean_square_norm(total, weight, eps)
    return x.new_empty(0) if residual is None else total, normed


# shapes


def _empty(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _rms_norm_fake(x, weight, residual, eps):
    # a result that does not exist is an empty tensor: an op cannot return None
    return x.new_empty((0,) if residual is None else x.shape), _empty(x)


def _norm_backward_fake(grad_out, grad_sum, v, y, gate, scale, segment, order, offsets, rows, eps, rms, wanted):
    return norm_math.backward_results(grad_out, grad_sum, rows, wanted)


# gradients


def _adaln_norm_setup(ctx, inputs, output):
    x, shift, scale, segment, ctx.eps = inputs
    _save(ctx, x, None, None, shift, scale, segment)


def _adaln_norm_backward(ctx, grad_out):
    grad_x, _, _, grad_shift, grad_scale = _backward(ctx, grad_out, None, False, (None, None, 1, 2))
    return grad_x, grad_shift, grad_scale, None, None


def _gated_residual_adaln_norm_setup(ctx, inputs, output):
    _, y, gate, shift, scale, segment, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    _save(ctx, output[0], y, gate, shift, scale, segment)


def _gated_residual_adaln_norm_backward(ctx, grad_sum, grad_out):
    return *_backward(ctx, grad_out, grad_sum, False, (1, 2, 3, 4)), None, None


def _gated_residual_setup(ctx, inputs, output):
    _, y, gate, segment = inputs
    ctx.eps = 0.0
    _save(ctx, None, y, gate, None, None, segment)


def _gated_residual_backward(ctx, grad_sum):
    return *_backward(ctx, None, grad_sum, False, (1, 2, None, None))[:3], None


def _rms_norm_setup(ctx, inputs, output):
    x, weight, residual, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.residual = residual is not None
    if not ctx.residual:
        ctx.mark_non_differentiable(output[0])
    _save(ctx, output[0] if ctx.residual else x, None, None, None, weight.view(1, -1), None)


def _rms_norm_backward(ctx, grad_sum, grad_out):
    grad_sum = grad_sum if ctx.residual else None
    grad_x, _, _, _, grad_weight = _backward(ctx, grad_out, grad_sum, True, (None, None, None, 1))
    grad_weight = None if grad_weight is None else grad_weight.view(-1)
    return grad_x, grad_weight, grad_x if ctx.residual else None, None


def _save(ctx, v, y, gate, shift, scale, segment):
    """Keeps what `_backward` needs: of shift the shape and dtype alone."""
    ctx.save_for_backward(v, y, gate, scale, segment)
    ctx.shift = None if shift is None else shift.dtype
    ctx.rows = next((table.shape[0] for table in (gate, shift, scale) if table is not None), 1)


def _backward(ctx, grad_out, grad_sum, rms, inputs):
    """Gradients of x, y, gate, shift, scale; `inputs` are the places of the last four among the op's arguments."""
    v, y, gate, scale, segment = ctx.saved_tensors
    if grad_out is None and grad_sum is None:
        return [None] * 5
    exists = (y is not None, gate is not None, ctx.shift is not None, scale is not None)
    needed = [e and i is not None and ctx.needs_input_grad[i] for e, i in zip(exists, inputs, strict=True)]
    if grad_out is None:
        needed[2] = needed[3] = False
    bits = zip((GRAD_Y, GRAD_GATE, GRAD_SHIFT, GRAD_SCALE), needed, strict=True)
    # without a gate y gets the gradient of x
    plain = GRAD_Y if gate is None else 0
    wanted = sum(bit for bit, need in bits if need) & ~plain
    order, offsets = None, None
    like = grad_sum if grad_out is None else grad_out
    dtypes = (None, None if gate is None else gate.dtype, ctx.shift, None if scale is None else scale.dtype)
    if wanted & ~GRAD_Y:
        order, offsets = norm_math.segment_order(segment, ctx.rows)
        if all(dtype == like.dtype for dtype, need in zip(dtypes[1:], needed[1:], strict=True) if need):
            wanted |= NARROW_SUMS
    found = _norm_backward_op(
        grad_out,
        grad_sum,
        v if grad_out is not None else None,
        y if needed[1] else None,
        gate,
        scale if grad_out is not None else None,
        segment,
        order,
        offsets,
        ctx.rows,
        ctx.eps,
        rms,
        wanted,
    )
    grad_x = found[0] if grad_out is not None else grad_sum
    grads = [found[i + 1] if need else None for i, need in enumerate(needed)]
    if plain and needed[0]:
        grads[0] = grad_x
    return [grad_x, grads[0], *(g if g is None else g.to(t) for g, t in zip(grads[1:], dtypes[1:], strict=True))]


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad_out):
    return _swiglu_backward_op(grad_out, *ctx.saved_tensors)


# ops


def too_wide(*args) -> str | None:
    """Why Triton does not norm the rows of the first tensor among the arguments, or None."""
    width = next(arg.shape[-1] for arg in args if isinstance(arg, torch.Tensor))
    return f"rows of {width} elements are longer than {MAX_WIDTH}" if width > MAX_WIDTH else None


_ROW: dict[str, Any] = dict(triton="norm", unsupported={"triton": too_wide})

_adaln_norm_op = library.Op(
    "adaln_norm",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? segment, float eps) -> Tensor",
    check=_check_adaln_norm,
    check_values=lambda x, shift, scale, segment, eps: _check_segment(segment, shift, scale),
    reference=norm_math.layer_norm,
    fake=lambda x, shift, scale, segment, eps: _empty(x),
    setup_context=_adaln_norm_setup,
    backward=_adaln_norm_backward,
    **_ROW,
)
_gated_residual_adaln_norm_op = library.Op(
    "gated_residual_adaln_norm",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? segment, float eps) -> (Tensor, Tensor)",
    check=_check_gated_residual_adaln_norm,
    check_values=lambda x, y, gate, shift, scale, segment, eps: _check_segment(segment, gate, shift, scale),
    reference=_gated_residual_adaln_norm_reference,
    fake=lambda x, y, gate, shift, scale, segment, eps: (_empty(x), _empty(x)),
    setup_context=_gated_residual_adaln_norm_setup,
    backward=_gated_residual_adaln_norm_backward,
    **_ROW,
)
_gated_residual_op = library.Op(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate, Tensor? segment) -> Tensor",
    check=_check_gated_residual,
    check_values=lambda x, y, gate, segment: _check_segment(segment, gate),
    reference=residual_sum,
    fake=lambda x, y, gate, segment: _empty(x),
    setup_context=_gated_residual_setup,
    backward=_gated_residual_backward,
    **_ROW,
)
_rms_norm_op = library.Op(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor)",
    check=_check_rms_norm,
    reference=_rms_norm_reference,
    fake=_rms_norm_fake,
    setup_context=_rms_norm_setup,
    backward=_rms_norm_backward,
    **_ROW,
)
_norm_backward_op = library.Op(
    "norm_backward",
    "(Tensor? grad_out, Tensor? grad_sum, Tensor? v, Tensor? y, Tensor? gate, Tensor? scale, Tensor? segment, "
    "Tensor? order, Tensor? offsets, SymInt rows, float eps, bool rms, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_gradients,
    reference=norm_math.norm_backward,
    jvp=norm_math.differentiable_norm_backward,
    fake=_norm_backward_fake,
    **_ROW,
)
_swiglu_op = library.Op(
    "swiglu",
    "(Tensor x) -> Tensor",
    check=_check_swiglu,
    reference=norm_math.swiglu,
    fake=lambda x: x.new_empty((x.shape[0], x.shape[1] // 2)),
    triton="norm",
    setup_context=_swiglu_setup,
    backward=_swiglu_backward,
)
_swiglu_backward_op = library.Op(
    "swiglu_backward",
    "(Tensor grad_out, Tensor x) -> Tensor",
    check=_check_swiglu_backward,
    reference=norm_math.swiglu_backward,
    fake=lambda grad_out, x: _empty(x),
    triton="norm",
)

"""Norms between residual blocks with their modulation and residual fused in, and SwiGLU; each with its reference.

Per row, with s = segment[row], the row of the modulation tables that the token takes (never expanded to tokens):
    sum = x + gate[s] * y
    out = LN(sum) * (1 + scale[s]) + shift[s],   or   sum / rms(sum) * weight
Everything is float32 inside and rounded once at each result; out follows from the rounded sum, as it does where the
two are computed one after the other.

All norms share three kernels: `norm_forward`, `norm_backward` (rows) and `norm_sums` (gradients of the tables). The
last takes rows in the order of their segments and adds them in a fixed order, so gradients repeat bit for bit.
"""

from __future__ import annotations

import torch

from . import checks, library

LAYER, RMS = 0, 1
# on a GPU one block holds a row in registers
MAX_WIDTH = 8192
# rows of one partial sum on a GPU
SUM_ROWS = 64
# gradients that a backward is asked for
GRAD_Y, GRAD_GATE, GRAD_SHIFT, GRAD_SCALE = 1, 2, 4, 8


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
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers; from the C++ kernel a segment out of
    range is a RuntimeError.
    Source: adaptive layer norm of arXiv 2212.09748, section 3.2.
    """
    _check_tables(x, {"shift": shift, "scale": scale}, segment, checks.FLOATS)
    return _adaln_norm_op(x, shift, scale, segment, _check_eps(eps))


def adaln_norm_ref(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The specification of `adaln_norm` in plain, differentiable PyTorch; it takes float64 too and then computes so."""
    _check_tables(x, {"shift": shift, "scale": scale}, segment, (*checks.FLOATS, torch.float64))
    centred = _wide(x) - _wide(x).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + _check_eps(eps))
    if scale is not None:
        normed = normed * (1 + _rows_of(scale, segment))
    if shift is not None:
        normed = normed + _rows_of(shift, segment)
    return normed.to(x.dtype)


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
    _check_tables(x, {"gate": gate, "shift": shift, "scale": scale}, segment, checks.FLOATS)
    _check_like("y", y, x)
    return _gated_residual_adaln_norm_op(x, y, gate, shift, scale, segment, _check_eps(eps))


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
    _check_tables(x, {"gate": gate, "shift": shift, "scale": scale}, segment, (*checks.FLOATS, torch.float64))
    _check_like("y", y, x)
    x_new = _add_ref(x, y, gate, segment)
    return x_new, adaln_norm_ref(x_new, shift, scale, segment, eps=eps)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, segment: torch.Tensor | None = None
) -> torch.Tensor:
    """x + gate[segment] * y, [n, d] in x's dtype; arguments as in `gated_residual_adaln_norm`; differentiable."""
    _check_residual(x, y, gate, segment, checks.FLOATS)
    return _gated_residual_op(x, y, gate, segment)


def gated_residual_ref(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, segment: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification of `gated_residual` in plain PyTorch; it takes float64 too."""
    _check_residual(x, y, gate, segment, (*checks.FLOATS, torch.float64))
    return _add_ref(x, y, gate, segment)


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
    _check_rms(x, weight, residual, checks.FLOATS)
    total, normed = _rms_norm_op(x, weight, residual, _check_eps(eps))
    return normed if residual is None else (total, normed)


def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `rms_norm` in plain, differentiable PyTorch; it takes float64 too."""
    _check_rms(x, weight, residual, (*checks.FLOATS, torch.float64))
    total = x if residual is None else _add_ref(x, residual, None, None)
    square = _wide(total).square().mean(-1, keepdim=True)
    normed = (_wide(total) * torch.rsqrt(square + _check_eps(eps)) * _wide(weight)).to(x.dtype)
    return normed if residual is None else (total, normed)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(x[:, :h]) * x[:, h:] with silu(a) = a / (1 + exp(-a)); differentiable.

    x: [n, 2 * h] float32, bfloat16 or float16; rows may lie any stride apart.
    Returns [n, h] in x's dtype, rounded once; empty for an empty x. Raises TypeError or ValueError for another dtype or
    shape. Source: arXiv 2002.05202, equation 6 without the projections.
    """
    _check_swiglu(x, checks.FLOATS)
    return _swiglu_op(x)


def swiglu_ref(x: torch.Tensor) -> torch.Tensor:
    """The specification of `swiglu` in plain, differentiable PyTorch; it takes float64 too."""
    _check_swiglu(x, (*checks.FLOATS, torch.float64))
    a, b = _wide(x).chunk(2, -1)
    return (a * torch.sigmoid(a) * b).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows_of(table: torch.Tensor, segment: torch.Tensor | None) -> torch.Tensor:
    """[n, d] for a segment, else [1, d]."""
    return _wide(table) if segment is None else _wide(table).index_select(0, segment)


def _add_ref(x, y, gate, segment) -> torch.Tensor:
    added = _wide(y) if gate is None else _rows_of(gate, segment) * _wide(y)
    return (_wide(x) + added).to(x.dtype)


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


def _check_like(name, value, x):
    checks.tensor(name, value, (x.dtype,))
    checks.like(name, value, "x", x)


def _check_residual(x, y, gate, segment, floats):
    checks.tensor("gate", gate)
    _check_tables(x, {"gate": gate}, segment, floats)
    _check_like("y", y, x)


def _check_rms(x, weight, residual, floats):
    checks.tensor("x", x, floats, 2)
    checks.tensor("weight", weight, (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32), 1)
    checks.shape("weight", weight, x.shape[1:])
    checks.same_device("weight", weight, "x", x)
    if residual is not None:
        _check_like("residual", residual, x)


def _check_swiglu(x, floats):
    checks.tensor("x", x, floats, 2)
    if x.shape[1] % 2:
        checks.reject("x", "have the shape [n, 2 * h]", list(x.shape))


def _check_eps(eps) -> float:
    return checks.at_least("eps", eps, 0)


def _check_segment(segment: torch.Tensor | None, rows: int):
    """Looks at the values, on the CPU alone; the C++ kernel looks for itself."""
    if segment is None or segment.device.type != "cpu" or segment.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(segment))
    if low < 0 or high >= rows:
        checks.reject("segment", f"lie between 0 and {rows - 1}", low if low < 0 else high)


# ops


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    """Rows of x contiguous, whatever lies between them."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _tables(*tables: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tables with contiguous rows and one dtype: float32 where they differ."""
    given = [table.dtype for table in tables if table is not None]
    mixed = len(given) > 1 and len(set(given)) > 1
    return [_dense(table.float() if mixed and table is not None else table) for table in tables]


def _forward(x, y, gate, shift, scale, segment, eps, kind, total, out):
    """Fills total = x + gate * y and out, either of which may be None."""
    if x.numel():
        gate, shift, scale = _tables(gate, shift, scale)
        if gate is None and shift is None and scale is None:
            segment = None
        library.launch(
            "norm_forward", _dense(x), _dense(y), gate, shift, scale, _contiguous(segment), eps, kind, total, out
        )


def _empty(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _adaln_norm_impl(x, shift, scale, segment, eps):
    out = _empty(x)
    _forward(x, None, None, shift, scale, segment, eps, LAYER, None, out)
    return out


def _adaln_norm_setup(ctx, inputs, output):
    x, shift, scale, segment, ctx.eps = inputs
    _save(ctx, x, None, None, shift, scale, segment)


def _adaln_norm_backward(ctx, grad_out):
    grad_x, _, _, grad_shift, grad_scale = _backward(ctx, grad_out, None, LAYER, (None, None, 1, 2))
    return grad_x, grad_shift, grad_scale, None, None


def _gated_residual_adaln_norm_impl(x, y, gate, shift, scale, segment, eps):
    total, out = _empty(x), _empty(x)
    _forward(x, y, gate, shift, scale, segment, eps, LAYER, total, out)
    return total, out


def _gated_residual_adaln_norm_setup(ctx, inputs, output):
    _, y, gate, shift, scale, segment, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    _save(ctx, output[0], y, gate, shift, scale, segment)


def _gated_residual_adaln_norm_backward(ctx, grad_sum, grad_out):
    return *_backward(ctx, grad_out, grad_sum, LAYER, (1, 2, 3, 4)), None, None


def _gated_residual_impl(x, y, gate, segment):
    total = _empty(x)
    _forward(x, y, gate, None, None, segment, 0.0, LAYER, total, None)
    return total


def _gated_residual_setup(ctx, inputs, output):
    _, y, gate, segment = inputs
    ctx.eps = 0.0
    _save(ctx, None, y, gate, None, None, segment)


def _gated_residual_backward(ctx, grad_sum):
    return *_backward(ctx, None, grad_sum, LAYER, (1, 2, None, None))[:3], None


def _rms_norm_impl(x, weight, residual, eps):
    # a result that does not exist is an empty tensor: an op cannot return None
    total, out = _rms_norm_fake(x, weight, residual, eps)
    _forward(x, residual, None, None, weight.view(1, -1), None, eps, RMS, None if residual is None else total, out)
    return total, out


def _rms_norm_fake(x, weight, residual, eps):
    return x.new_empty((0,) if residual is None else x.shape), _empty(x)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, residual, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.residual = residual is not None
    if not ctx.residual:
        ctx.mark_non_differentiable(output[0])
    _save(ctx, output[0] if ctx.residual else x, None, None, None, weight.view(1, -1), None)


def _rms_norm_backward(ctx, grad_sum, grad_out):
    grad_sum = grad_sum if ctx.residual else None
    grad_x, _, _, _, grad_weight = _backward(ctx, grad_out, grad_sum, RMS, (None, None, None, 1))
    grad_weight = None if grad_weight is None else grad_weight.view(-1)
    return grad_x, grad_weight, grad_x if ctx.residual else None, None


def _save(ctx, v, y, gate, shift, scale, segment):
    """Keeps what `_backward` needs: of shift the shape and dtype alone."""
    ctx.save_for_backward(v, y, gate, scale, segment)
    ctx.shift = None if shift is None else shift.dtype
    ctx.rows = next((table.shape[0] for table in (gate, shift, scale) if table is not None), 1)


def _backward(ctx, grad_out, grad_sum, kind, inputs):
    """Gradients of x, y, gate, shift, scale; `inputs` are the places of the last four among the op's arguments."""
    v, y, gate, scale, segment = ctx.saved_tensors
    if grad_out is None and grad_sum is None:
        return [None] * 5
    exists = (y is not None, gate is not None, ctx.shift is not None, scale is not None)
    needed = [e and i is not None and ctx.needs_input_grad[i] for e, i in zip(exists, inputs, strict=True)]
    if grad_out is None:
        needed[2] = needed[3] = False
    wanted = sum(bit for bit, need in zip((GRAD_Y, GRAD_GATE, GRAD_SHIFT, GRAD_SCALE), needed, strict=True) if need)
    # without a gate y gets the gradient of x
    plain = GRAD_Y if gate is None else 0
    found = _norm_backward_op(
        grad_out,
        grad_sum,
        v if grad_out is not None else None,
        y if needed[1] else None,
        gate,
        scale if grad_out is not None else None,
        segment,
        ctx.rows,
        ctx.eps,
        kind,
        wanted & ~plain,
    )
    grad_x = found[0] if grad_out is not None else grad_sum
    grads = [found[i + 1] if need else None for i, need in enumerate(needed)]
    if plain and needed[0]:
        grads[0] = grad_x
    dtypes = (None, None if gate is None else gate.dtype, ctx.shift, None if scale is None else scale.dtype)
    return [grad_x, grads[0], *(g if g is None else g.to(t) for g, t in zip(grads[1:], dtypes[1:], strict=True))]


def _norm_backward_impl(grad_out, grad_sum, v, y, gate, scale, segment, rows, eps, kind, wanted):
    results = _norm_backward_fake(grad_out, grad_sum, v, y, gate, scale, segment, rows, eps, kind, wanted)
    grad_x, grad_y, *grads = results
    grad_out, grad_sum, v, y, segment = (_contiguous(t) for t in (grad_out, grad_sum, v, y, segment))
    grad = grad_sum if grad_out is None else grad_out
    if grad.numel() == 0:
        for table in grads:
            table.zero_()
        return results
    gate, scale = _tables(gate, scale)
    grad_y = grad_y if wanted & GRAD_Y else None
    dv = grad_x if grad_out is not None else grad_sum
    stats = grad.new_empty((grad.shape[0], 2), dtype=torch.float32) if wanted & GRAD_SCALE else None
    if grad_out is not None or grad_y is not None:
        grad_x = grad_x if grad_out is not None else None
        library.launch("norm_backward", grad_out, grad_sum, v, gate, scale, segment, eps, kind, grad_x, grad_y, stats)
    if wanted & ~GRAD_Y:
        grads = [g if wanted & bit else None for g, bit in zip(grads, (GRAD_GATE, GRAD_SHIFT, GRAD_SCALE), strict=True)]
        order, offsets = _order(segment, rows, grad)
        library.launch("norm_sums", grad_out, dv, v, y, stats, segment, order, offsets, *grads)
    return results


def _norm_backward_fake(grad_out, grad_sum, v, y, gate, scale, segment, rows, eps, kind, wanted):
    grad = grad_sum if grad_out is None else grad_out

    def table(bit):
        return grad.new_empty((rows, grad.shape[1]) if wanted & bit else (0,), dtype=torch.float32)

    return (
        grad.new_empty(grad.shape if grad_out is not None else (0,)),
        grad.new_empty(grad.shape if wanted & GRAD_Y else (0,)),
        table(GRAD_GATE),
        table(GRAD_SHIFT),
        table(GRAD_SCALE),
    )


def _order(segment: torch.Tensor | None, rows: int, like: torch.Tensor):
    """The rows by segment, int64 [n] (None: as they are), and where each segment begins in them, int64 [rows + 1]."""
    if segment is None:
        ends = torch.zeros(2, dtype=torch.int64, device=like.device)
        ends[1:].fill_(like.shape[0])
        return None, ends
    # a segment out of range counts as the one that the kernels clamp it to
    by_segment, order = torch.sort(segment.clamp(0, rows - 1), stable=True)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=like.device)
    return order, torch.searchsorted(by_segment, starts)


def _swiglu_impl(x):
    out = _swiglu_fake(x)
    if out.numel():
        library.launch("swiglu", _dense(x), out)
    return out


def _swiglu_fake(x):
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad_out):
    return _swiglu_backward_op(grad_out, *ctx.saved_tensors)


def _swiglu_backward_impl(grad_out, x):
    grad_x = _empty(x)
    if grad_x.numel():
        library.launch("swiglu_backward", grad_out.contiguous(), _dense(x), grad_x)
    return grad_x


_adaln_norm_op = library.define(
    "adaln_norm",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? segment, float eps) -> Tensor",
    _adaln_norm_impl,
    lambda x, shift, scale, segment, eps: _empty(x),
)
_gated_residual_adaln_norm_op = library.define(
    "gated_residual_adaln_norm",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? segment, float eps) -> (Tensor, Tensor)",
    _gated_residual_adaln_norm_impl,
    lambda x, y, gate, shift, scale, segment, eps: (_empty(x), _empty(x)),
)
_gated_residual_op = library.define(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate, Tensor? segment) -> Tensor",
    _gated_residual_impl,
    lambda x, y, gate, segment: _empty(x),
)
_rms_norm_op = library.define(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor)",
    _rms_norm_impl,
    _rms_norm_fake,
)
_norm_backward_op = library.define(
    "norm_backward",
    "(Tensor? grad_out, Tensor? grad_sum, Tensor? v, Tensor? y, Tensor? gate, Tensor? scale, Tensor? segment, "
    "SymInt rows, float eps, int kind, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_backward_impl,
    _norm_backward_fake,
)
_swiglu_op = library.define("swiglu", "(Tensor x) -> Tensor", _swiglu_impl, _swiglu_fake)
_swiglu_backward_op = library.define(
    "swiglu_backward", "(Tensor grad_out, Tensor x) -> Tensor", _swiglu_backward_impl, lambda grad_out, x: _empty(x)
)
library.define_autograd("adaln_norm", _adaln_norm_backward, _adaln_norm_setup)
library.define_autograd(
    "gated_residual_adaln_norm", _gated_residual_adaln_norm_backward, _gated_residual_adaln_norm_setup
)
library.define_autograd("gated_residual", _gated_residual_backward, _gated_residual_setup)
library.define_autograd("rms_norm", _rms_norm_backward, _rms_norm_setup)
library.define_autograd("swiglu", _swiglu_backward, _swiglu_setup)


# backends: tensors have contiguous rows, those of a backward are contiguous, the tables of a call share a dtype


def _rows_in(gate, shift, scale) -> int:
    return next((table.shape[0] for table in (gate, shift, scale) if table is not None), 1)


def norm_forward_reference(x, y, gate, shift, scale, segment, eps, kind, total, out):
    _check_segment(segment, _rows_in(gate, shift, scale))
    v = x
    if y is not None:
        v = _add_ref(x, y, gate, segment)
        total.copy_(v)
    if out is None:
        return
    if kind == RMS:
        out.copy_(rms_norm_ref(v, scale[0], eps=eps))
    else:
        out.copy_(adaln_norm_ref(v, shift, scale, segment, eps=eps))


def _statistics(v, eps, kind):
    """mean and rstd [n, 1] float32."""
    mean = v.float().mean(-1, keepdim=True) if kind == LAYER else torch.zeros_like(v[:, :1], dtype=torch.float32)
    return mean, torch.rsqrt((v.float() - mean).square().mean(-1, keepdim=True) + eps)


def norm_backward_reference(grad_out, grad_sum, v, gate, scale, segment, eps, kind, grad_x, grad_y, stats):
    dv = 0 if grad_sum is None else grad_sum.float()
    if grad_out is not None:
        mean, rstd = _statistics(v, eps, kind)
        normed = (v.float() - mean) * rstd
        a = grad_out.float()
        if scale is not None:
            a = a * (_rows_of(scale, segment) + (kind == LAYER))
        inner = a - normed * (a * normed).mean(-1, keepdim=True)
        if kind == LAYER:
            inner = inner - a.mean(-1, keepdim=True)
        dv = dv + rstd * inner
        grad_x.copy_(dv)
        if stats is not None:
            stats.copy_(torch.cat([mean, rstd], 1))
    if grad_y is not None:
        grad_y.copy_(dv * _rows_of(gate, segment))


def norm_sums_reference(grad_out, dv, v, y, stats, segment, order, offsets, grad_gate, grad_shift, grad_scale):
    def fill(grad, terms):
        terms = (terms if order is None else terms[order]).double()
        grad.copy_(torch.segment_reduce(terms, "sum", offsets=offsets, axis=0, unsafe=True, initial=0))

    if grad_gate is not None:
        fill(grad_gate, dv.float() * y.float())
    if grad_shift is not None:
        fill(grad_shift, grad_out.float())
    if grad_scale is not None:
        fill(grad_scale, grad_out.float() * ((v.float() - stats[:, :1]) * stats[:, 1:]))


def swiglu_reference(x, out):
    out.copy_(swiglu_ref(x))


def swiglu_backward_reference(grad_out, x, grad_x):
    a, b = x.float().chunk(2, -1)
    s, grad = torch.sigmoid(a), grad_out.float()
    grad_x.copy_(torch.cat([grad * b * s * (1 + a * (1 - s)), grad * a * s], -1))


def norm_forward_native(*args):
    torch.ops.flexkernels_native.norm_forward(*args)


def norm_backward_native(*args):
    torch.ops.flexkernels_native.norm_backward(*args)


def norm_sums_native(*args):
    torch.ops.flexkernels_native.norm_sums(*args, _partial(args))


def _partial(args) -> torch.Tensor | None:
    """[3, blocks + segments, d] float32 for the sums of each block of rows within each segment, on a GPU alone."""
    offsets = args[7]
    if offsets.device.type == "cpu":
        return None
    return partial_sums(args[1], offsets)


def partial_sums(dv: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Room for block b of segment s at slot b + s: no two share a slot, since along the rows b or s rises."""
    blocks = (dv.shape[0] + SUM_ROWS - 1) // SUM_ROWS
    return dv.new_empty((3, blocks + offsets.shape[0] - 1, dv.shape[1]), dtype=torch.float32)


def swiglu_native(x, out):
    torch.ops.flexkernels_native.swiglu(x, out)


def swiglu_backward_native(grad_out, x, grad_x):
    torch.ops.flexkernels_native.swiglu_backward(grad_out, x, grad_x)


def norm_forward_triton(x, y, gate, shift, scale, segment, *rest):
    from .triton import norm

    _check_segment(segment, _rows_in(gate, shift, scale))
    norm.norm_forward_triton(x, y, gate, shift, scale, segment, *rest)


def norm_backward_triton(*args):
    from .triton import norm

    norm.norm_backward_triton(*args)


def norm_sums_triton(*args):
    from .triton import norm

    norm.norm_sums_triton(*args, partial_sums(args[1], args[7]))


def swiglu_triton(x, out):
    from .triton import norm

    norm.swiglu_triton(x, out)


def swiglu_backward_triton(grad_out, x, grad_x):
    from .triton import norm

    norm.swiglu_backward_triton(grad_out, x, grad_x)


def _too_wide(*args) -> str | None:
    width = next(arg.shape[1] for arg in args if isinstance(arg, torch.Tensor))
    return f"rows of {width} elements are longer than {MAX_WIDTH}" if width > MAX_WIDTH else None


library.register("norm_forward", "reference", norm_forward_reference)
library.register("norm_forward", "cpu", norm_forward_native)
library.register("norm_forward", "triton", norm_forward_triton, _too_wide)
library.register("norm_forward", "cuda", norm_forward_native, _too_wide)
library.register("norm_backward", "reference", norm_backward_reference)
library.register("norm_backward", "cpu", norm_backward_native)
library.register("norm_backward", "triton", norm_backward_triton, _too_wide)
library.register("norm_backward", "cuda", norm_backward_native, _too_wide)
library.register("norm_sums", "reference", norm_sums_reference)
library.register("norm_sums", "cpu", norm_sums_native)
library.register("norm_sums", "triton", norm_sums_triton, _too_wide)
library.register("norm_sums", "cuda", norm_sums_native, _too_wide)
library.register("swiglu", "reference", swiglu_reference)
library.register("swiglu", "cpu", swiglu_native)
library.register("swiglu", "triton", swiglu_triton)
library.register("swiglu", "cuda", swiglu_native)
library.register("swiglu_backward", "reference", swiglu_backward_reference)
library.register("swiglu_backward", "cpu", swiglu_backward_native)
library.register("swiglu_backward", "triton", swiglu_backward_triton)
library.register("swiglu_backward", "cuda", swiglu_backward_native)

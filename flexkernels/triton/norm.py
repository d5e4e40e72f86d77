"""Row norms and SwiGLU in Triton, float32 inside whatever comes in.

forward:  sum = x + gate[s] * y,  out = (sum - mean) * rstd * (1 + scale[s]) + shift[s];  rms: mean = 0, factor scale
backward: a = grad_out * factor,  dv = rstd * (a - mean(a) - xhat * mean(a * xhat)) + grad_sum;  rms: without mean(a)
sums:     by segment, grad_gate = sum dv * y, grad_shift = sum grad_out, grad_scale = sum grad_out * xhat
swiglu:   a * b / (1 + exp(-a))
"""

import torch
import triton
import triton.language as tl

from ..norm_math import GRAD_GATE, GRAD_SCALE, GRAD_SHIFT, GRAD_Y, backward_results, given_order
from .elementary import sigmoid

# rows and columns of one partial sum
SUM_ROWS, SUM_COLUMNS = 64, 64
SWIGLU_BLOCK = 1024


@triton.jit
def segment_of(p_segment, row, segments):
    """Table row of `row`, clamped so that no foreign memory is read."""
    segment = row * 0
    if p_segment is not None:
        segment = tl.minimum(tl.maximum(tl.load(p_segment + row), 0), segments - 1).to(tl.int64)
    return segment


@triton.jit
def factor(p_scale, o_scale, m_d, RMS: tl.constexpr):
    b_factor = tl.load(p_scale + o_scale, mask=m_d, other=0.0).to(tl.float32)
    if not RMS:
        b_factor += 1.0
    return b_factor


@triton.jit
def statistics(b_v, m_d, d, eps, RMS: tl.constexpr):
    """mean and rstd of a row; lanes beyond it are zero."""
    mean = 0.0
    b_c = b_v
    if not RMS:
        mean = tl.sum(b_v) / d
        b_c = tl.where(m_d, b_v - mean, 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(b_c * b_c) / d + eps)


@triton.jit
def norm_forward_kernel(
    p_x,
    p_y,
    p_gate,
    p_shift,
    p_scale,
    p_segment,
    p_sum,
    p_out,
    d,
    segments,
    x_stride,
    y_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one row a program
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < d
    segment = segment_of(p_segment, row, segments)
    b_v = tl.load(p_x + row * x_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_y is not None:
        b_y = tl.load(p_y + row * y_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_gate is not None:
            b_y *= tl.load(p_gate + segment * gate_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum = (b_v + b_y).to(p_sum.dtype.element_ty)
        tl.store(p_sum + row * d + o_d, b_sum, mask=m_d)
        b_v = b_sum.to(tl.float32)
    if p_out is not None:
        mean, rstd = statistics(b_v, m_d, d, eps, RMS)
        b_out = (b_v - mean) * rstd
        if p_scale is not None:
            b_out *= factor(p_scale, segment * scale_stride + o_d, m_d, RMS)
        if p_shift is not None:
            b_out += tl.load(p_shift + segment * shift_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_out + row * d + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def norm_backward_kernel(
    p_grad_out,
    p_grad_sum,
    p_v,
    p_gate,
    p_scale,
    p_segment,
    p_grad_x,
    p_grad_y,
    p_stats,
    d,
    segments,
    gate_stride,
    scale_stride,
    eps,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < d
    o_row = row * d + o_d
    segment = segment_of(p_segment, row, segments)
    b_dv = tl.zeros([BLOCK], dtype=tl.float32)
    if p_grad_out is not None:
        b_v = tl.load(p_v + o_row, mask=m_d, other=0.0).to(tl.float32)
        mean, rstd = statistics(b_v, m_d, d, eps, RMS)
        b_normed = tl.where(m_d, (b_v - mean) * rstd, 0.0)
        b_dv = tl.load(p_grad_out + o_row, mask=m_d, other=0.0).to(tl.float32)
        if p_scale is not None:
            b_dv *= factor(p_scale, segment * scale_stride + o_d, m_d, RMS)
        mean_ax = tl.sum(b_dv * b_normed) / d
        if not RMS:
            b_dv -= tl.sum(b_dv) / d
        b_dv = rstd * (b_dv - b_normed * mean_ax)
        if p_stats is not None:
            tl.store(p_stats + 2 * row, mean)
            tl.store(p_stats + 2 * row + 1, rstd)
    if p_grad_sum is not None:
        b_dv += tl.load(p_grad_sum + o_row, mask=m_d, other=0.0).to(tl.float32)
    if p_grad_x is not None:
        tl.store(p_grad_x + o_row, b_dv.to(p_grad_x.dtype.element_ty), mask=m_d)
    if p_grad_y is not None:
        b_gate = tl.load(p_gate + segment * gate_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_grad_y + o_row, (b_dv * b_gate).to(p_grad_y.dtype.element_ty), mask=m_d)


@triton.jit
def norm_sums_kernel(
    p_grad_out,
    p_dv,
    p_v,
    p_y,
    p_stats,
    p_segment,
    p_order,
    p_offsets,
    p_partial,
    n,
    d,
    segments,
    slots,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # block b of ROWS rows in order; partial [3, slots, d], with the sums of b within segment s at slot b + s
    block = tl.program_id(0).to(tl.int64)
    first = block * ROWS
    end = tl.minimum(first + ROWS, n)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < d
    first_segment = first * 0
    last_segment = first * 0
    if p_order is not None:
        first_segment = segment_of(p_segment, tl.load(p_order + first), segments)
        last_segment = segment_of(p_segment, tl.load(p_order + end - 1), segments)
    for segment in range(first_segment, last_segment + 1):
        low = first
        high = end
        if p_offsets is not None:
            low = tl.maximum(tl.load(p_offsets + segment), first)
            high = tl.minimum(tl.load(p_offsets + segment + 1), end)
        b_gate = tl.zeros([STEP, COLUMNS], dtype=tl.float32)
        b_shift = tl.zeros([STEP, COLUMNS], dtype=tl.float32)
        b_scale = tl.zeros([STEP, COLUMNS], dtype=tl.float32)
        for begin in range(low, high, STEP):
            o_n = begin + tl.arange(0, STEP)
            m_n = o_n < high
            o_row = o_n
            if p_order is not None:
                o_row = tl.load(p_order + o_n, mask=m_n, other=0)
            # [STEP, COLUMNS]
            o_nd = o_row[:, None] * d + o_d[None, :]
            m_nd = m_n[:, None] & m_d[None, :]
            if GATE:
                b_dv = tl.load(p_dv + o_nd, mask=m_nd, other=0.0).to(tl.float32)
                b_gate += b_dv * tl.load(p_y + o_nd, mask=m_nd, other=0.0).to(tl.float32)
            if SHIFT or SCALE:
                b_grad = tl.load(p_grad_out + o_nd, mask=m_nd, other=0.0).to(tl.float32)
                b_shift += b_grad
                if SCALE:
                    b_mean = tl.load(p_stats + 2 * o_row, mask=m_n, other=0.0)
                    b_rstd = tl.load(p_stats + 2 * o_row + 1, mask=m_n, other=0.0)
                    b_v = tl.load(p_v + o_nd, mask=m_nd, other=0.0).to(tl.float32)
                    b_scale += b_grad * ((b_v - b_mean[:, None]) * b_rstd[:, None])
        p_slot = p_partial + (block + segment) * d + o_d
        if GATE:
            tl.store(p_slot, tl.sum(b_gate, axis=0), mask=m_d)
        if SHIFT:
            tl.store(p_slot + slots * d, tl.sum(b_shift, axis=0), mask=m_d)
        if SCALE:
            tl.store(p_slot + 2 * slots * d, tl.sum(b_scale, axis=0), mask=m_d)


@triton.jit
def norm_merge_kernel(
    p_partial,
    p_offsets,
    p_grad_gate,
    p_grad_shift,
    p_grad_scale,
    n,
    d,
    slots,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < d
    begin = segment * n
    end = begin + n
    if p_offsets is not None:
        begin = tl.load(p_offsets + segment)
        end = tl.load(p_offsets + segment + 1)
    b_gate = tl.zeros([COLUMNS], dtype=tl.float32)
    b_shift = tl.zeros([COLUMNS], dtype=tl.float32)
    b_scale = tl.zeros([COLUMNS], dtype=tl.float32)
    # no block where the segment is empty
    last = tl.where(end > begin, (end + ROWS - 1) // ROWS, 0)
    for block in range(begin // ROWS, last):
        p_slot = p_partial + (block + segment) * d + o_d
        if p_grad_gate is not None:
            b_gate += tl.load(p_slot, mask=m_d, other=0.0)
        if p_grad_shift is not None:
            b_shift += tl.load(p_slot + slots * d, mask=m_d, other=0.0)
        if p_grad_scale is not None:
            b_scale += tl.load(p_slot + 2 * slots * d, mask=m_d, other=0.0)
    if p_grad_gate is not None:
        tl.store(p_grad_gate + segment * d + o_d, b_gate, mask=m_d)
    if p_grad_shift is not None:
        tl.store(p_grad_shift + segment * d + o_d, b_shift, mask=m_d)
    if p_grad_scale is not None:
        tl.store(p_grad_scale + segment * d + o_d, b_scale, mask=m_d)


@triton.jit
def swiglu_kernel(p_x, p_out, h, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < h
    b_a = tl.load(p_x + row * x_stride + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + row * x_stride + h + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_s = sigmoid(b_a, p_out.dtype.element_ty == tl.float32)
    tl.store(p_out + row * h + o_h, (b_a * b_s * b_b).to(p_out.dtype.element_ty), mask=m_h)


@triton.jit
def swiglu_backward_kernel(p_grad_out, p_x, p_grad_x, h, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < h
    b_a = tl.load(p_x + row * x_stride + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + row * x_stride + h + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad_out + row * h + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_s = sigmoid(b_a, p_grad_x.dtype.element_ty == tl.float32)
    b_grad_a = b_grad * b_b * b_s * (1.0 + b_a * (1.0 - b_s))
    p_row = p_grad_x + row * 2 * h
    tl.store(p_row + o_h, b_grad_a.to(p_grad_x.dtype.element_ty), mask=m_h)
    tl.store(p_row + h + o_h, (b_grad * b_a * b_s).to(p_grad_x.dtype.element_ty), mask=m_h)


def _row_options(d: int) -> dict:
    """One block holds the row; a warp for each 512 elements of it, 1 to 16 of them."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _segments(*tables) -> int:
    return next((table.shape[0] for table in tables if table is not None), 1)


def _stride(table) -> int:
    return 0 if table is None else table.stride(0)


def adaln_norm_triton(x, shift, scale, segment, eps):
    out = x.new_empty(x.shape)
    _forward(x, None, None, shift, scale, segment, eps, False, None, out)
    return out


def gated_residual_adaln_norm_triton(x, y, gate, shift, scale, segment, eps):
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    _forward(x, y, gate, shift, scale, segment, eps, False, total, out)
    return total, out


def gated_residual_triton(x, y, gate, segment):
    total = x.new_empty(x.shape)
    _forward(x, y, gate, None, None, segment, 0.0, False, total, None)
    return total


def rms_norm_triton(x, weight, residual, eps):
    total, out = x.new_empty((0,) if residual is None else x.shape), x.new_empty(x.shape)
    given = None if residual is None else total
    _forward(x, residual, None, None, weight.view(1, -1), None, eps, True, given, out)
    return total, out


def norm_backward_triton(grad_out, grad_sum, v, y, gate, scale, segment, order, offsets, rows, eps, rms, wanted):
    results = backward_results(grad_out, grad_sum, rows, wanted)
    grad_x, grad_y, *grads = results
    given = grad_out, grad_sum, v, y, segment, order, offsets
    grad_out, grad_sum, v, y, segment, order, offsets = map(_contiguous, given)
    grad = grad_sum if grad_out is None else grad_out
    if grad.numel() == 0:
        for table in grads:
            table.zero_()
        return results
    gate, scale = _tables(gate, scale)
    stats = grad.new_empty((grad.shape[0], 2), dtype=torch.float32) if wanted & GRAD_SCALE else None
    given_y, given_x = grad_y if wanted & GRAD_Y else None, None if grad_out is None else grad_x
    if given_x is not None or given_y is not None:
        launch_backward(grad_out, grad_sum, v, gate, scale, segment, eps, rms, given_x, given_y, stats)
    if wanted & ~GRAD_Y:
        grads = [g if wanted & bit else None for g, bit in zip(grads, (GRAD_GATE, GRAD_SHIFT, GRAD_SCALE), strict=True)]
        dv = grad_sum if grad_out is None else grad_x
        order, offsets = given_order(segment, order, offsets, rows)
        launch_sums(grad_out, dv, v, y, stats, segment, order, offsets, *grads)
    return results


def swiglu_triton(x):
    out = x.new_empty((x.shape[0], x.shape[1] // 2))
    if out.numel():
        launch_swiglu(_dense(x), out)
    return out


def swiglu_backward_triton(grad_out, x):
    grad_x = x.new_empty(x.shape)
    if grad_x.numel():
        launch_swiglu_backward(grad_out.contiguous(), _dense(x), grad_x)
    return grad_x


def _forward(x, y, gate, shift, scale, segment, eps, rms, total, out):
    """Fills total = x + gate * y and out, either of which may be None."""
    if x.numel():
        if gate is None and shift is None and scale is None:
            segment = None
        gate, shift, scale = _tables(gate, shift, scale)
        launch_forward(_dense(x), _dense(y), gate, shift, scale, _contiguous(segment), eps, rms, total, out)


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


def launch_forward(x, y, gate, shift, scale, segment, eps, rms, total, out):
    """Fills total = x + gate * y and out [n, d], either of which may be None, from tensors with contiguous rows."""
    n, d = x.shape
    with torch.cuda.device_of(x):
        norm_forward_kernel[(n,)](
            x,
            y,
            gate,
            shift,
            scale,
            segment,
            total,
            out,
            d,
            _segments(gate, shift, scale),
            x.stride(0),
            _stride(y),
            _stride(gate),
            _stride(shift),
            _stride(scale),
            eps,
            RMS=rms,
            **_row_options(d),
        )


def launch_backward(grad_out, grad_sum, v, gate, scale, segment, eps, rms, grad_x, grad_y, stats):
    """Fills grad_x, grad_y [n, d] and stats [n, 2], each of which may be None, from contiguous tensors."""
    grad = grad_sum if grad_out is None else grad_out
    n, d = grad.shape
    with torch.cuda.device_of(grad):
        norm_backward_kernel[(n,)](
            grad_out,
            grad_sum,
            v,
            gate,
            scale,
            segment,
            grad_x,
            grad_y,
            stats,
            d,
            _segments(gate, scale),
            _stride(gate),
            _stride(scale),
            eps,
            RMS=rms,
            **_row_options(d),
        )


def launch_sums(grad_out, dv, v, y, stats, segment, order, offsets, grad_gate, grad_shift, grad_scale):
    """Fills the gradients [segments, d] that are not None."""
    (n, d), segments = dv.shape, 1 if offsets is None else offsets.shape[0] - 1
    # block b of segment s has slot b + s: no two share one, since along the rows b or s rises
    slots = triton.cdiv(n, SUM_ROWS) + segments
    partial = dv.new_empty((3, slots, d), dtype=torch.float32)
    columns = triton.cdiv(d, SUM_COLUMNS)
    with torch.cuda.device_of(dv):
        norm_sums_kernel[(triton.cdiv(n, SUM_ROWS), columns)](
            grad_out,
            dv,
            v,
            y,
            stats,
            segment,
            order,
            offsets,
            partial,
            n,
            d,
            segments,
            slots,
            GATE=grad_gate is not None,
            SHIFT=grad_shift is not None,
            SCALE=grad_scale is not None,
            ROWS=SUM_ROWS,
            STEP=16,
            COLUMNS=SUM_COLUMNS,
            num_warps=4,
        )
        norm_merge_kernel[(segments, columns)](
            partial,
            offsets,
            grad_gate,
            grad_shift,
            grad_scale,
            n,
            d,
            slots,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_COLUMNS,
            num_warps=2,
        )


def launch_swiglu(x, out):
    """Fills out [n, h] from x [n, 2 h] with contiguous rows."""
    n, h = out.shape
    with torch.cuda.device_of(x):
        swiglu_kernel[(n, triton.cdiv(h, SWIGLU_BLOCK))](x, out, h, x.stride(0), BLOCK=SWIGLU_BLOCK, num_warps=4)


def launch_swiglu_backward(grad_out, x, grad_x):
    """Fills grad_x [n, 2 h] from grad_out [n, h], contiguous, and x with contiguous rows."""
    n, h = grad_out.shape
    with torch.cuda.device_of(x):
        swiglu_backward_kernel[(n, triton.cdiv(h, SWIGLU_BLOCK))](
            grad_out, x, grad_x, h, x.stride(0), BLOCK=SWIGLU_BLOCK, num_warps=4
        )

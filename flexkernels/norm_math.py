"""The norms' formulas in plain PyTorch, and what their backends share."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# gradients that norm_backward is asked for, beside that of x
GRAD_Y, GRAD_GATE, GRAD_SHIFT, GRAD_SCALE = 1, 2, 4, 8
# with them: those of the tables in the dtype of the rows instead of float32
NARROW_SUMS = 16
# rows whose order one block of a GPU finds as fast as torch sorts them
ORDER_ROWS = 65536


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rows_of(table: torch.Tensor, segment: torch.Tensor | None) -> torch.Tensor:
    """[n, d] for a segment, else [1, d]."""
    return wide(table) if segment is None else wide(table).index_select(0, segment)


def residual_sum(x, y, gate, segment) -> torch.Tensor:
    """x + gate[segment] * y, rounded to x's dtype; without a gate x + y."""
    added = wide(y) if gate is None else rows_of(gate, segment) * wide(y)
    return (wide(x) + added).to(x.dtype)


def layer_norm(x, shift, scale, segment, eps) -> torch.Tensor:
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if scale is not None:
        normed = normed * (1 + rows_of(scale, segment))
    if shift is not None:
        normed = normed + rows_of(shift, segment)
    return normed.to(x.dtype)


def root_mean_square_norm(x, weight, eps) -> torch.Tensor:
    square = wide(x).square().mean(-1, keepdim=True)
    return (wide(x) * torch.rsqrt(square + eps) * wide(weight)).to(x.dtype)


def statistics(v, eps, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and rstd [n, 1] float32."""
    mean = torch.zeros_like(v[:, :1], dtype=torch.float32) if rms else wide(v).mean(-1, keepdim=True)
    return mean, torch.rsqrt((wide(v) - mean).square().mean(-1, keepdim=True) + eps)


# of each segment tensor: its version and rows when the order was found, and the order
_orders = WeakTensorKeyDictionary()


def segment_order(segment: torch.Tensor | None, rows: int):
    """The rows by segment, int64 [n] (None: as they are), and where each segment begins in them, int64 [rows + 1].

    Found once for a segment tensor that does not change: all blocks and steps of a packing share it. (None, None) where
    all rows take one table row, and where norm_backward finds it faster: in a capture.
    """
    if segment is None or rows == 1:
        return None, None
    if not _remembered(segment):
        return (None, None) if segment.is_cuda and len(segment) <= ORDER_ROWS else _find_order(segment, rows)
    state, order = _orders.get(segment, (None, None))
    if state != (segment._version, rows):
        order = _find_order(segment, rows)
        _orders[segment] = (segment._version, rows), order
    return order


def _remembered(segment) -> bool:
    """Not while tracing, nor in a capture, whose memory holds values only after a replay."""
    plain = type(segment) is torch.Tensor and not segment.is_inference() and not torch.compiler.is_compiling()
    return plain and not (segment.is_cuda and torch.cuda.is_current_stream_capturing())


def given_order(segment, order, offsets, rows: int):
    """`order` and `offsets` of norm_backward, found where they are left to it; (None, None) for one table row."""
    return (order, offsets) if offsets is not None or rows == 1 else _find_order(segment, rows)


def _find_order(segment, rows):
    # a segment out of range counts as the one that the kernels clamp it to
    by_segment, order = torch.sort(segment.clamp(0, rows - 1), stable=True)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=segment.device)
    return order, torch.searchsorted(by_segment, starts)


def backward_results(grad_out, grad_sum, rows: int, wanted: int):
    """New memory for the results of norm_backward: gradients of x, y, gate, shift, scale; empty where not wanted."""
    grad = grad_sum if grad_out is None else grad_out

    def table(bit):
        return grad.new_empty((rows, grad.shape[1]) if wanted & bit else (0,), dtype=sum_dtype(grad, wanted))

    return (
        grad.new_empty(grad.shape if grad_out is not None else (0,)),
        grad.new_empty(grad.shape if wanted & GRAD_Y else (0,)),
        table(GRAD_GATE),
        table(GRAD_SHIFT),
        table(GRAD_SCALE),
    )


def sum_dtype(grad: torch.Tensor, wanted: int) -> torch.dtype:
    """Of the tables' gradients."""
    return grad.dtype if wanted & NARROW_SUMS else torch.float32


def _segment_sums(terms, order, offsets) -> torch.Tensor:
    """Float64 inside."""
    if offsets is None:
        return terms.double().sum(0, keepdim=True).to(terms.dtype)
    total = (terms if order is None else terms[order]).double()
    return torch.segment_reduce(total, "sum", offsets=offsets, axis=0, unsafe=True, initial=0).to(terms.dtype)


def _added_sums(terms, order, offsets) -> torch.Tensor:
    """`_segment_sums` with a forward-mode derivative, which segment_reduce does not have."""
    if offsets is None:
        return terms.double().sum(0, keepdim=True).to(terms.dtype)
    rows, each = len(offsets) - 1, torch.arange(len(terms), device=terms.device)
    segment = torch.searchsorted(offsets, each, right=True) - 1
    total = (terms if order is None else terms[order]).double()
    return total.new_zeros((rows, terms.shape[1])).index_add(0, segment, total).to(terms.dtype)


def norm_backward(
    grad_out, grad_sum, v, y, gate, scale, segment, order, offsets, rows, eps, rms, wanted, sums=_segment_sums
):
    """grad_x = grad_sum + (d out / d sum)^T grad_out, grad_y = gate[s] * grad_x, and over each segment's rows
    grad_gate = sum grad_x * y, grad_shift = sum grad_out, grad_scale = sum grad_out * xhat."""
    dv = torch.zeros_like(wide(grad_out)) if grad_sum is None else wide(grad_sum)
    xhat = None
    if grad_out is not None:
        mean, rstd = statistics(v, eps, rms)
        xhat, a = (wide(v) - mean) * rstd, wide(grad_out)
        if scale is not None:
            a = a * (rows_of(scale, segment) + (0 if rms else 1))
        inner = a - xhat * (a * xhat).mean(-1, keepdim=True)
        if not rms:
            inner = inner - a.mean(-1, keepdim=True)
        dv = dv + rstd * inner
    like = grad_sum if grad_out is None else grad_out
    none = like.new_zeros((0,))
    if wanted & ~GRAD_Y:
        order, offsets = given_order(segment, order, offsets, rows)

    def table(bit, terms):
        total = sums(terms(), order, offsets) if wanted & bit else none.float()
        return total.to(like.dtype) if wanted & NARROW_SUMS else total

    return (
        dv.to(like.dtype) if grad_out is not None else none,
        (dv * rows_of(gate, segment)).to(like.dtype) if wanted & GRAD_Y else none.clone(),
        table(GRAD_GATE, lambda: wide(dv.to(like.dtype)) * wide(y)),
        table(GRAD_SHIFT, lambda: wide(grad_out)),
        table(GRAD_SCALE, lambda: wide(grad_out) * xhat),
    )


def differentiable_norm_backward(*args):
    return norm_backward(*args, sums=_added_sums)


def swiglu(x) -> torch.Tensor:
    a, b = wide(x).chunk(2, -1)
    return (a * torch.sigmoid(a) * b).to(x.dtype)


def swiglu_backward(grad_out, x) -> torch.Tensor:
    a, b = wide(x).chunk(2, -1)
    s, grad = torch.sigmoid(a), wide(grad_out)
    return torch.cat([grad * b * s * (1 + a * (1 - s)), grad * a * s], -1).to(x.dtype)

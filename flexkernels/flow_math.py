"""The arithmetic of one guided flow step, forward and backward, in plain PyTorch on flat tensors."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

# what the ops and the kernels call the three kinds of guidance
NO_GUIDANCE, GUIDANCE_CFG, GUIDANCE_APG = 0, 1, 2
SMALLEST_NORM = 1e-12


class Tensors(NamedTuple):
    """The tensors of one step, in the order of the op's schema."""

    x: torch.Tensor
    v_cond: torch.Tensor
    v_uncond: torch.Tensor | None
    momentum_buffer: torch.Tensor | None
    row_offsets: torch.Tensor | None
    prefix: torch.Tensor | None
    prefix_offsets: torch.Tensor | None
    prefix_noise: torch.Tensor | None


class Numbers(NamedTuple):
    """The Python numbers of one step, in the order of the op's schema."""

    dt: float
    guidance: int
    scale: float
    threshold: float
    eta: float
    momentum: float
    prefix_time: float


class Rows:
    """Rows of a flat tensor [total], equal (offsets None) or ragged (offsets int64 [rows + 1])."""

    def __init__(self, rows: int, offsets: torch.Tensor | None, like: torch.Tensor):
        self.rows, self.offsets, self.total, self.device = rows, offsets, like.numel(), like.device

    @property
    def length(self) -> int:
        """Of every row, when they are equal."""
        return self.total // max(self.rows, 1)

    @cached_property
    def starts(self) -> torch.Tensor:
        """int64 [rows + 1]."""
        if self.offsets is not None:
            return self.offsets
        return torch.arange(self.rows + 1, device=self.device) * self.length

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [total], the row of each element."""
        return torch.searchsorted(self.starts, torch.arange(self.total, device=self.device), right=True) - 1

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """[total] -> [rows]."""
        if self.offsets is None:
            return value.view(self.rows, self.length).sum(1)
        return value.new_zeros(self.rows).index_add(0, self.index, value)

    def norm(self, value: torch.Tensor) -> torch.Tensor:
        """[total] -> [rows]."""
        return self.sum(value.square()).sqrt()

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """[rows] -> [total]."""
        if self.offsets is None:
            return value.unsqueeze(1).expand(-1, self.length).reshape(-1)
        return value[self.index]


def flatten(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Every float tensor flat and in `dtype`; the offsets as they are."""
    offsets = (tensors.row_offsets, tensors.prefix_offsets)
    flat = [None if value is None else value.reshape(-1).to(dtype) for value in tensors]
    return Tensors(*flat)._replace(row_offsets=offsets[0], prefix_offsets=offsets[1])


def direction(flat: Tensors, numbers: Numbers) -> torch.Tensor:
    """APG's v_cond - v_uncond with momentum, which is also the next momentum buffer."""
    d = flat.v_cond - flat.v_uncond
    if numbers.momentum and flat.momentum_buffer is not None:
        d = d + numbers.momentum * flat.momentum_buffer
    return d


def velocity(flat: Tensors, row: Rows, numbers: Numbers) -> torch.Tensor:
    """The guided velocity [total]."""
    c = flat.v_cond
    if numbers.guidance == NO_GUIDANCE:
        return c
    if numbers.guidance == GUIDANCE_CFG:
        return flat.v_uncond + numbers.scale * (c - flat.v_uncond)
    d = direction(flat, numbers)
    if numbers.threshold > 0:
        d = d * row.spread((numbers.threshold / row.norm(d)).clamp(max=1))
    unit = c / row.spread(row.norm(c).clamp(min=SMALLEST_NORM))
    d_par = row.spread(row.sum(d * unit)) * unit
    return c + (numbers.scale - 1) * ((d - d_par) + numbers.eta * d_par)


def prefix_target(flat: Tensors, row: Rows) -> torch.Tensor:
    """int64, for each element of the flat prefix the element of x that it overwrites."""
    prefix_row = Rows(row.rows, flat.prefix_offsets, flat.prefix)
    place = torch.arange(prefix_row.total, device=row.device)
    return place + (row.starts - prefix_row.starts)[prefix_row.index]


def prefix_values(flat: Tensors, prefix_time: float) -> torch.Tensor:
    if flat.prefix_noise is None:
        return flat.prefix
    return (1 - prefix_time) * flat.prefix + prefix_time * flat.prefix_noise


def step_backward(
    flat: Tensors, row: Rows, numbers: Numbers, grad_x_next: torch.Tensor, grad_momentum_next: torch.Tensor | None
) -> Tensors:
    """Gradients of every float tensor, flat, from those of the two results; `flat.x` is not looked at."""
    grad_prefix, grad_noise = None, None
    if flat.prefix is not None:
        target = prefix_target(flat, row)
        grad_prefix = grad_x_next[target]
        grad_x_next = grad_x_next.index_fill(0, target, 0)
    if flat.prefix_noise is not None:
        grad_noise = numbers.prefix_time * grad_prefix
        grad_prefix = (1 - numbers.prefix_time) * grad_prefix
    grads = _velocity_backward(flat, row, numbers, numbers.dt * grad_x_next, grad_momentum_next)
    return Tensors(grad_x_next, *grads, None, grad_prefix, None, grad_noise)


def _velocity_backward(flat: Tensors, row: Rows, numbers: Numbers, grad: torch.Tensor, grad_direction):
    """Gradients of v_cond, v_uncond, momentum_buffer from those of the velocity and of the next momentum buffer."""
    if numbers.guidance == NO_GUIDANCE:
        return grad, None, None
    if numbers.guidance == GUIDANCE_CFG:
        return numbers.scale * grad, (1 - numbers.scale) * grad, None
    grad_c, grad_d = _projection_backward(flat, row, numbers, grad)
    if grad_direction is not None:
        grad_d = grad_d + grad_direction
    grad_buffer = None if flat.momentum_buffer is None else numbers.momentum * grad_d
    return grad_c + grad_d, -grad_d, grad_buffer


def _projection_backward(flat: Tensors, row: Rows, numbers: Numbers, grad: torch.Tensor):
    """Gradients of c and d in v = c + k * s * (d - a * (d.u) * u), u = c / |c|, s = min(1, threshold / |d|).

    With q = d.u and r = grad.u per row:
        grad_d = k * s * (grad - a * r * u - [s < 1] * (grad.d - a * q * r) / |d|^2 * d)
        grad_c = grad - k * s * a / |c| * (r * (d - q * u) + q * (grad - r * u))
    """
    k, a = numbers.scale - 1, 1 - numbers.eta
    d, norm_c = direction(flat, numbers), row.norm(flat.v_cond)
    u = flat.v_cond / row.spread(norm_c.clamp(min=SMALLEST_NORM))
    q, r = row.sum(d * u), row.sum(grad * u)
    # below SMALLEST_NORM u is c times a constant, which has no projection term
    turns = (norm_c > SMALLEST_NORM).to(d.dtype)
    factor, shrink = torch.full_like(q, k), torch.zeros_like(q)
    if numbers.threshold > 0:
        norm_d = row.norm(d)
        factor = k * (numbers.threshold / norm_d).clamp(max=1)
        shrink = torch.where(norm_d > numbers.threshold, (row.sum(grad * d) - a * q * r) / norm_d.square(), 0)
    grad_d = row.spread(factor) * (grad - row.spread(a * r) * u - row.spread(shrink) * d)
    change = row.spread(r) * d + row.spread(q) * grad - row.spread(2 * q * r * turns) * u
    return grad - row.spread(factor * a / norm_c.clamp(min=SMALLEST_NORM)) * change, grad_d

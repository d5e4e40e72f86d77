"""The arithmetic of one guided flow update, forward and backward, in plain PyTorch on flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

# the most states and the most past velocities that one update takes
MAX_TERMS = 3
# numbers of an update that may lie on the device: MAX_TERMS of a, b, MAX_TERMS of past_b, scale, prefix_time
SCALARS = 2 * MAX_TERMS + 3
# what the ops and the kernels call the three kinds of guidance
NO_GUIDANCE, GUIDANCE_CFG, GUIDANCE_APG = 0, 1, 2
SMALLEST_NORM = 1e-12


class Tensors(NamedTuple):
    """The tensors of one update, in the order of the op's schema."""

    x: torch.Tensor
    v_cond: torch.Tensor
    v_uncond: torch.Tensor | None
    momentum_buffer: torch.Tensor | None
    row_offsets: torch.Tensor | None
    prefix: torch.Tensor | None
    prefix_offsets: torch.Tensor | None
    prefix_noise: torch.Tensor | None
    scalars: torch.Tensor | None = None
    more_x: Sequence[torch.Tensor] = ()
    past: Sequence[torch.Tensor] = ()


class Numbers(NamedTuple):
    """The Python numbers of one update, in the order of the op's schema; `a` has one for x and for each of more_x."""

    a: Sequence[float]
    b: float
    past_b: Sequence[float]
    guidance: int
    scale: float
    threshold: float
    eta: float
    momentum: float
    rescale: float
    prefix_time: float


TENSORS, NUMBERS = len(Tensors._fields), len(Numbers._fields)


def split(args) -> tuple[Tensors, Numbers, bool]:
    """The op's arguments as Tensors, Numbers, return_velocity."""
    end = TENSORS + NUMBERS
    return Tensors._make(args[:TENSORS]), Numbers._make(args[TENSORS:end]), args[end]


def count_rows(tensors: Tensors) -> int:
    if tensors.row_offsets is None:
        return tensors.x.shape[0] * tensors.x.shape[1]
    return tensors.row_offsets.shape[0] - 1


def used_terms(tensors: Tensors, numbers: Numbers) -> tuple[list, list, list, list]:
    """The states, their numbers, the past velocities, theirs: less those, but the first state, whose number is known
    to be 0."""
    unknown = tensors.scalars is not None
    states = [(x, a) for x, a in zip(tensors.more_x, numbers.a[1:], strict=True) if unknown or a]
    past = [(v, b) for v, b in zip(tensors.past, numbers.past_b, strict=True) if unknown or b]
    states = [(tensors.x, numbers.a[0]), *states]
    return [x for x, _ in states], [a for _, a in states], [v for v, _ in past], [b for _, b in past]


def read_scalars(tensors: Tensors, numbers: Numbers) -> tuple[Tensors, Numbers]:
    """The numbers with those of `tensors.scalars`, of no dimensions; zeros for the terms whose number is 0."""
    a, b, past_b, (scale, prefix_time) = tensors.scalars.split([MAX_TERMS, 1, MAX_TERMS, 2])
    a, past_b = a.unbind()[: len(numbers.a)], past_b.unbind()[: len(numbers.past_b)]
    read = lambda terms, weights: [torch.where(w == 0, 0, x) for x, w in zip(terms, weights, strict=True)]  # noqa: E731
    tensors = tensors._replace(more_x=read(tensors.more_x, a[1:]), past=read(tensors.past, past_b))
    return tensors, numbers._replace(a=a, b=b[0], past_b=past_b, scale=scale, prefix_time=prefix_time)


def empty_results(tensors: Tensors, numbers: Numbers, return_velocity: bool):
    """New memory for the momentum buffer and the velocity; empty where there is none: an op cannot return None."""
    x = tensors.x
    momentum_next = x.new_empty(x.shape if numbers.momentum else (0,), dtype=torch.float32)
    return momentum_next, x.new_empty(x.shape if return_velocity else (0,), dtype=torch.float32)


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

    def centred(self, value: torch.Tensor) -> torch.Tensor:
        """[total], less the mean of its row."""
        return value - self.spread(self.sum(value) / self.starts.diff())

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """[rows] -> [total]."""
        if self.offsets is None:
            return value.unsqueeze(1).expand(-1, self.length).reshape(-1)
        return value[self.index]


def flatten(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Every float tensor flat and in `dtype`; offsets and scalars as they are."""

    def flat(value):
        if isinstance(value, (list, tuple)):
            return [flat(each) for each in value]
        return None if value is None else value.reshape(-1).to(dtype)

    as_they_are = {name: getattr(tensors, name) for name in ("row_offsets", "prefix_offsets", "scalars")}
    return Tensors(*map(flat, tensors))._replace(**as_they_are)


def direction(flat: Tensors, numbers: Numbers) -> torch.Tensor:
    """APG's v_cond - v_uncond with momentum, which is also the next momentum buffer."""
    d = flat.v_cond - flat.v_uncond
    if numbers.momentum:
        d = d + numbers.momentum * flat.momentum_buffer
    return d


def velocity(flat: Tensors, row: Rows, numbers: Numbers) -> torch.Tensor:
    """The guided velocity [total]."""
    c = flat.v_cond
    if numbers.guidance == NO_GUIDANCE:
        return c
    if numbers.guidance == GUIDANCE_CFG:
        v = flat.v_uncond + numbers.scale * (c - flat.v_uncond)
        return row.spread(rescaling(row, c, v, numbers.rescale)) * v if numbers.rescale else v
    d = direction(flat, numbers)
    if numbers.threshold > 0:
        d = d * row.spread((numbers.threshold / row.norm(d)).clamp(max=1))
    unit = c / row.spread(row.norm(c).clamp(min=SMALLEST_NORM))
    d_par = row.spread(row.sum(d * unit)) * unit
    return c + (numbers.scale - 1) * ((d - d_par) + numbers.eta * d_par)


def rescaling(row: Rows, c: torch.Tensor, v: torch.Tensor, rescale: float) -> torch.Tensor:
    """[rows], the factor rescale * std(v_cond) / std(v) + 1 - rescale; 1 where v is constant in the row."""
    square_c, square_v = (row.sum(row.centred(value).square()) for value in (c, v))
    # not where it is NaN, which spreads over the row
    constant = square_v <= 0
    ratio = torch.where(constant, 1, square_c / torch.where(constant, 1, square_v)).sqrt()
    return rescale * ratio + 1 - rescale


def combine(flat: Tensors, numbers: Numbers, v: torch.Tensor) -> torch.Tensor:
    """x_next [total] before the prefix: sum a_i x_i + b v + sum past_b_j past_j."""
    states, a, past, past_b = used_terms(flat, numbers)
    out = a[0] * states[0] + numbers.b * v
    for weight, value in zip((*a[1:], *past_b), (*states[1:], *past), strict=True):
        out = out + weight * value
    return out


def prefix_target(flat: Tensors, row: Rows) -> torch.Tensor:
    """int64, for each element of the flat prefix the element of x that it overwrites."""
    prefix_row = Rows(row.rows, flat.prefix_offsets, flat.prefix)
    place = torch.arange(prefix_row.total, device=row.device)
    return place + (row.starts - prefix_row.starts)[prefix_row.index]


def prefix_values(flat: Tensors, prefix_time: float) -> torch.Tensor:
    if flat.prefix_noise is None:
        return flat.prefix
    return (1 - prefix_time) * flat.prefix + prefix_time * flat.prefix_noise


def update(tensors: Tensors, numbers: Numbers, return_velocity: bool, wide: torch.dtype = torch.float32):
    """x_next, the next momentum buffer and the velocity, the last two empty where there is none; `wide` inside."""
    x = tensors.x
    flat, row = flatten(tensors, wide), Rows(count_rows(tensors), tensors.row_offsets, x)
    if flat.scalars is not None:
        flat, numbers = read_scalars(flat, numbers)
    v = velocity(flat, row, numbers)
    out = combine(flat, numbers, v)
    if tensors.prefix is not None:
        out = out.index_copy(0, prefix_target(flat, row), prefix_values(flat, numbers.prefix_time))
    momentum_next, none = x.new_empty((0,), dtype=wide), x.new_empty((0,), dtype=wide)
    if numbers.momentum:
        momentum_next = direction(flat, numbers).view(x.shape)
    # v may be v_cond itself, and no result may share an input's memory
    v = v.view(x.shape).clone() if return_velocity else none
    return out.view(x.shape).to(x.dtype), momentum_next, v


def update_backward(
    flat: Tensors, row: Rows, numbers: Numbers, grad_x_next: torch.Tensor, grad_momentum_next, grad_velocity
) -> Tensors:
    """Gradients of every float tensor, flat, from those of the results (None where there is none).

    `flat.x`, `flat.more_x` and `flat.past` are not looked at.
    """
    grad_prefix, grad_noise = None, None
    if flat.prefix is not None:
        target = prefix_target(flat, row)
        grad_prefix = grad_x_next[target]
        grad_x_next = grad_x_next.index_fill(0, target, 0)
    if flat.prefix_noise is not None:
        grad_noise = numbers.prefix_time * grad_prefix
        grad_prefix = (1 - numbers.prefix_time) * grad_prefix
    grad_v = numbers.b * grad_x_next
    if grad_velocity is not None:
        grad_v = grad_v + grad_velocity
    grads = _velocity_backward(flat, row, numbers, grad_v, grad_momentum_next)
    grad_x, *grad_more_x = (weight * grad_x_next for weight in numbers.a)
    grad_past = [weight * grad_x_next for weight in numbers.past_b]
    return Tensors(grad_x, *grads, None, grad_prefix, None, grad_noise, None, grad_more_x, grad_past)


def _velocity_backward(flat: Tensors, row: Rows, numbers: Numbers, grad: torch.Tensor, grad_direction):
    """Gradients of v_cond, v_uncond, momentum_buffer from those of the velocity and of the next momentum buffer."""
    if numbers.guidance == NO_GUIDANCE:
        return grad, None, None
    if numbers.guidance == GUIDANCE_CFG:
        grad_c = 0
        if numbers.rescale:
            grad_c, grad = _rescaling_backward(flat, row, numbers, grad)
        return grad_c + numbers.scale * grad, (1 - numbers.scale) * grad, None
    grad_c, grad_d = _projection_backward(flat, row, numbers, grad)
    if grad_direction is not None:
        grad_d = grad_d + grad_direction
    grad_buffer = None if flat.momentum_buffer is None else numbers.momentum * grad_d
    return grad_c + grad_d, -grad_d, grad_buffer


def _rescaling_backward(flat: Tensors, row: Rows, numbers: Numbers, grad: torch.Tensor):
    """Gradients of c and v in f * v, f = rescale * |c'| / |v'| + 1 - rescale, with c', v' less their means in the row.

    With w = rescale * (grad.v) * |c'| / |v'| per row: grad_c = w * c' / |c'|^2, grad_v = f * grad - w * v' / |v'|^2.
    """
    v = flat.v_uncond + numbers.scale * (flat.v_cond - flat.v_uncond)
    centred_c, centred_v = row.centred(flat.v_cond), row.centred(v)
    norm_c, norm_v = row.norm(centred_c), row.norm(centred_v)
    # a constant v keeps the factor 1; a constant c is a corner of its norm
    turns = numbers.rescale * row.sum(grad * v) * (norm_v > 0)
    along_c = torch.where(norm_c > 0, turns / (norm_c * norm_v), 0)
    along_v = torch.where(norm_v > 0, turns * norm_c / norm_v.pow(3), 0)
    factor = rescaling(row, flat.v_cond, v, numbers.rescale)
    return row.spread(along_c) * centred_c, row.spread(factor) * grad - row.spread(along_v) * centred_v


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

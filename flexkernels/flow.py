"""Guided updates of a flow ODE in one kernel: `flow_update`, its Euler case `flow_step`, and the guidances CFG and APG.

Per row (one channel of one sample), with d = v_cond - v_uncond + momentum * buffer:
    CFG: v = v_uncond + scale * (v_cond - v_uncond), then v *= rescale * std(v_cond) / std(v) + 1 - rescale
    APG: v = v_cond + (scale - 1) * (d_orth + eta * d_par), d first shortened to `threshold`, d_par along v_cond
and then x_next = sum a_i x_i + b * v + sum past_b_j past_j, with the conditioning prefix written over the first
elements of the row. `solvers` has the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import checks, legacy
from .flow_math import (
    GUIDANCE_APG,
    GUIDANCE_CFG,
    NO_GUIDANCE,
    Numbers,
    Rows,
    Tensors,
    combine,
    direction,
    flatten,
    prefix_target,
    prefix_values,
    update_backward,
    velocity,
)

# the most states and the most past velocities that one update takes
MAX_TERMS = 3


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (arXiv 2207.12598).

    scale: guidance strength, 1 for none; a number or a function of the time t. rescale: how far, 0 to 1, the standard
    deviation of the velocity in a row is drawn back to that of v_cond (arXiv 2305.08891, section 3.4).
    """

    scale: float | Callable[[float], float]
    rescale: float = 0.0

    def __post_init__(self):
        _check_scale(self.scale)
        if checks.at_least("CFG rescale", self.rescale, 0) > 1:
            checks.reject("CFG rescale", "be at most 1", self.rescale)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (arXiv 2410.02416, algorithm 1).

    scale: guidance strength, 1 for none; a number or a function of the time t. threshold: the largest norm of the
    guidance direction in a row, 0 for no limit. eta: what stays of the component parallel to v_cond.
    momentum: weight of the running average of directions, 0 for none, usually negative.
    """

    scale: float | Callable[[float], float] = 25.0
    threshold: float = 0.6
    eta: float = 0.0
    momentum: float = 0.0

    def __post_init__(self):
        _check_scale(self.scale)
        checks.at_least("APG threshold", self.threshold, 0)
        checks.finite("APG eta", self.eta)
        checks.finite("APG momentum", self.momentum)


def _check_scale(scale):
    if not callable(scale):
        checks.finite("guidance scale", scale)


def flow_update(
    x: Sequence[torch.Tensor],
    a: Sequence[float],
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    b: float,
    past: Sequence[torch.Tensor] = (),
    past_b: Sequence[float] = (),
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    prefix_offsets: torch.Tensor | None = None,
    prefix_noise: torch.Tensor | None = None,
    prefix_time: float = 0.0,
    return_velocity: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """sum a_i x_i + b * v + sum past_b_j past_j with the guided velocity v, in one pass over memory.

    x: 1 to 3 states of one shape and dtype: [B, C, ...] float32, bfloat16 or float16, whose B * C rows are guided each
        by itself (per channel; [B, 1, C * ...] guides per sample); or flat [total] with row_offsets int64 [rows + 1],
        row r being elements row_offsets[r] .. row_offsets[r + 1] (ragged batches).
    a: a number for each state. b: that of v. past_b: those of the past velocities.
    v_cond, v_uncond: velocities like x, in one of those dtypes; v_uncond only with guidance, which needs it.
    past: at most 3 guided velocities of earlier evaluations, float32 like x.
    guidance: None, CFG or APG with a number as scale (resolve a function of t before).
    momentum_buffer: float32 like x, the buffer that the update before returned, zeros for the first; with a momentum
        it must be given.
    prefix: float32 conditioning values. [B, C, ...], overwriting the first elements of each row, or flat with
        prefix_offsets int64 [rows + 1]. They become (1 - prefix_time) * prefix + prefix_time * prefix_noise, or
        plain prefix where no prefix_noise (float32, like prefix) is given.

    Returns x_next in x's shape and dtype, and the momentum buffer for the next update (float32, x's shape) when
    guidance is APG with a momentum, else None; with return_velocity also v (float32, x's shape), which the prefix does
    not touch. Differentiable in every float tensor. Arithmetic is in float32. States but the first and past velocities
    whose number is 0 are not read. Empty rows are left out; an empty x gives empty results.
    torch.compile takes the numbers as constants: a new b, scale or prefix_time compiles anew, new sizes do not.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers. Offsets are checked on the CPU;
    elsewhere that would wait for the device and is done under FLEXKERNELS_CHECK=1 alone, and offsets out of order
    leave elements of the results unwritten.
    Source: arXiv 2410.02416, algorithm 1, with norms per channel as in VideoFlexTok (arXiv 2604.12887).
    """
    tensors = _gather(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise, past)
    numbers = _check_numbers(tensors, a, b, past_b, guidance, prefix_time)
    rows = _check_update(tensors, numbers, checks.FLOATS, (torch.float32,))
    tensors, numbers = _without_zeros(tensors, numbers)
    op = _update_op if _needs_gradient(tensors) else _update_inference_op
    x_next, momentum_next, v = op(*tensors, rows, *numbers, return_velocity)
    return _results(x_next, momentum_next, v, numbers, return_velocity)


def flow_update_(
    x: Sequence[torch.Tensor],
    a: Sequence[float],
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    b: float,
    past: Sequence[torch.Tensor] = (),
    past_b: Sequence[float] = (),
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    prefix_offsets: torch.Tensor | None = None,
    prefix_noise: torch.Tensor | None = None,
    prefix_time: float = 0.0,
    return_velocity: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """`flow_update` that writes x_next into x[0], which must be contiguous and share no memory with the other tensors.

    Same arguments, results (the first is x[0]) and errors; not differentiable: ValueError where x[0] needs a gradient.
    """
    tensors = _gather(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise, past)
    numbers = _check_numbers(tensors, a, b, past_b, guidance, prefix_time)
    rows = _check_update(tensors, numbers, checks.FLOATS, (torch.float32,))
    tensors, numbers = _without_zeros(tensors, numbers)
    if not tensors.x.is_contiguous():
        checks.reject("x[0]", "be contiguous to be written in place", f"strides {tensors.x.stride()}")
    if _needs_gradient(tensors):
        checks.reject("x, v_cond and the others", "need no gradient in place", "requires_grad=True")
    momentum_next, v = _update_inplace_op(*tensors, rows, *numbers, return_velocity)
    return _results(tensors.x, momentum_next, v, numbers, return_velocity)


def flow_update_ref(
    x: Sequence[torch.Tensor],
    a: Sequence[float],
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    b: float,
    past: Sequence[torch.Tensor] = (),
    past_b: Sequence[float] = (),
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    prefix_offsets: torch.Tensor | None = None,
    prefix_noise: torch.Tensor | None = None,
    prefix_time: float = 0.0,
    return_velocity: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """The specification of `flow_update` in plain, differentiable PyTorch; it takes float64 too and computes so."""
    tensors = _gather(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise, past)
    numbers = _check_numbers(tensors, a, b, past_b, guidance, prefix_time)
    rows = _check_update(tensors, numbers, (*checks.FLOATS, torch.float64), (torch.float32, torch.float64))
    like, wide = tensors.x, torch.float64 if torch.float64 in (tensors.x.dtype, v_cond.dtype) else torch.float32
    flat, row = flatten(tensors, wide), Rows(rows, row_offsets, like)
    v = velocity(flat, row, numbers)
    out = combine(flat, numbers, v)
    if prefix is not None:
        out = out.index_copy(0, prefix_target(flat, row), prefix_values(flat, prefix_time))
    x_next, v = out.view(like.shape).to(like.dtype), v.view(like.shape)
    return _results(
        x_next, direction(flat, numbers).view(like.shape) if numbers.momentum else None, v, numbers, return_velocity
    )


def flow_step(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    dt: float,
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    prefix_offsets: torch.Tensor | None = None,
    prefix_noise: torch.Tensor | None = None,
    prefix_time: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Euler's step x + dt * v with the guided velocity v: `flow_update` of one state, which explains the arguments.

    x: one tensor. dt: step in time, negative when time runs from noise (1) to clean (0).
    Returns x_next and the momentum buffer for the next step, or None without a momentum.
    """
    return flow_update(
        (x,),
        (1.0,),
        v_cond,
        v_uncond,
        b=checks.finite("dt", dt),
        guidance=guidance,
        momentum_buffer=momentum_buffer,
        row_offsets=row_offsets,
        prefix=prefix,
        prefix_offsets=prefix_offsets,
        prefix_noise=prefix_noise,
        prefix_time=prefix_time,
    )


def flow_step_ref(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    dt: float,
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    prefix_offsets: torch.Tensor | None = None,
    prefix_noise: torch.Tensor | None = None,
    prefix_time: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification of `flow_step` in plain, differentiable PyTorch; it takes float64 too and then computes so."""
    return flow_update_ref(
        (x,),
        (1.0,),
        v_cond,
        v_uncond,
        b=checks.finite("dt", dt),
        guidance=guidance,
        momentum_buffer=momentum_buffer,
        row_offsets=row_offsets,
        prefix=prefix,
        prefix_offsets=prefix_offsets,
        prefix_noise=prefix_noise,
        prefix_time=prefix_time,
    )


# validation


def _gather(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise, past) -> Tensors:
    for name, value in (("x", x), ("past", past)):
        if not isinstance(value, (list, tuple)):
            checks.reject(name, "be a list or tuple of tensors", type(value).__name__, TypeError)
    if not 1 <= len(x) <= MAX_TERMS:
        checks.reject("x", f"hold 1 to {MAX_TERMS} tensors", len(x))
    if len(past) > MAX_TERMS:
        checks.reject("past", f"hold at most {MAX_TERMS} tensors", len(past))
    one_each = (v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise)
    return Tensors(x[0], *one_each, list(x[1:]), list(past))


def _check_update(tensors: Tensors, numbers: Numbers, floats, wide) -> int:
    """Checks everything that shapes and dtypes tell; `floats` are the dtypes of x and v, `wide` those of the rest.

    Returns the number of rows.
    """
    x, v_cond, v_uncond = tensors[:3]
    checks.tensor("x", x, floats)
    checks.tensor("v_cond", v_cond, floats)
    checks.like("v_cond", v_cond, "x", x)
    for i, value in enumerate(tensors.more_x, 1):
        checks.tensor(f"x[{i}]", value, (x.dtype,))
        checks.like(f"x[{i}]", value, "x[0]", x)
    for i, value in enumerate(tensors.past):
        checks.tensor(f"past[{i}]", value, wide)
        checks.like(f"past[{i}]", value, "x", x)
    if numbers.guidance == NO_GUIDANCE and v_uncond is not None:
        checks.reject("v_uncond", "be None without guidance", "a tensor")
    if numbers.guidance != NO_GUIDANCE:
        checks.tensor("v_uncond", v_uncond, (v_cond.dtype,))
        checks.like("v_uncond", v_uncond, "x", x)
    if tensors.momentum_buffer is None:
        if numbers.momentum:
            checks.reject("momentum_buffer", "be given with a momentum (zeros in the first step)", "None")
    else:
        if numbers.guidance != GUIDANCE_APG:
            checks.reject("momentum_buffer", "be None unless guidance is APG", "a tensor")
        checks.tensor("momentum_buffer", tensors.momentum_buffer, wide)
        checks.like("momentum_buffer", tensors.momentum_buffer, "x", x)
    rows = _check_rows(x, tensors.row_offsets)
    _check_prefix(tensors, rows, wide)
    return rows


def _check_numbers(tensors: Tensors, a, b, past_b, guidance, prefix_time) -> Numbers:
    a = _check_weights("a", a, "x", 1 + len(tensors.more_x))
    past_b = _check_weights("past_b", past_b, "past", len(tensors.past))
    b = checks.finite("b", b)
    prefix_time = checks.at_least("prefix_time", prefix_time, 0)
    if prefix_time > 1:
        checks.reject("prefix_time", "be at most 1", prefix_time)
    return Numbers(a, b, past_b, *_check_guidance(guidance), prefix_time)


def _check_weights(name: str, weights, of: str, count: int) -> list[float]:
    if not isinstance(weights, (list, tuple)):
        checks.reject(name, "be a list or tuple of numbers", type(weights).__name__, TypeError)
    if len(weights) != count:
        checks.reject(name, f"have {count} entries, one for each of {of}", len(weights))
    return [checks.finite(name, weight) for weight in weights]


def _check_guidance(guidance) -> tuple[int, float, float, float, float, float]:
    """kind, scale, threshold, eta, momentum, rescale."""
    if guidance is None:
        return NO_GUIDANCE, 1.0, 0.0, 0.0, 0.0, 0.0
    if not isinstance(guidance, (CFG, APG)):
        checks.reject("guidance", "be CFG, APG or None", type(guidance).__name__, TypeError)
    if callable(guidance.scale):
        checks.reject(
            "guidance scale", "be a number in one step (call it with the time before)", "a function", TypeError
        )
    scale = float(guidance.scale)
    if isinstance(guidance, CFG):
        return GUIDANCE_CFG, scale, 0.0, 0.0, 0.0, float(guidance.rescale)
    return GUIDANCE_APG, scale, float(guidance.threshold), float(guidance.eta), float(guidance.momentum), 0.0


def _without_zeros(tensors: Tensors, numbers: Numbers) -> tuple[Tensors, Numbers]:
    """Leaves out the states behind the first and the past velocities whose number is 0: nothing reads them."""
    if all(numbers.a[1:]) and all(numbers.past_b):
        return tensors, numbers
    states = [(x, weight) for x, weight in zip(tensors.more_x, numbers.a[1:], strict=True) if weight]
    past = [(v, weight) for v, weight in zip(tensors.past, numbers.past_b, strict=True) if weight]
    tensors = tensors._replace(more_x=[x for x, _ in states], past=[v for v, _ in past])
    a, past_b = [numbers.a[0], *(weight for _, weight in states)], [weight for _, weight in past]
    return tensors, numbers._replace(a=a, past_b=past_b)


def _check_rows(x: torch.Tensor, row_offsets: torch.Tensor | None) -> int:
    if row_offsets is None:
        if x.dim() < 2:
            checks.reject("x", "have the shape [B, C, ...] when there are no row_offsets", list(x.shape))
        return x.shape[0] * x.shape[1]
    _check_offsets("row_offsets", row_offsets, x)
    if x.dim() != 1:
        checks.reject("x", "be flat [total] when row_offsets are given", f"shape {list(x.shape)}")
    if len(row_offsets) == 0:
        checks.reject("row_offsets", "have rows + 1 entries", 0)
    return row_offsets.shape[0] - 1


def _check_prefix(tensors: Tensors, rows: int, wide):
    x, prefix, noise, starts = tensors.x, tensors.prefix, tensors.prefix_noise, tensors.prefix_offsets
    if prefix is None:
        if noise is not None or starts is not None:
            checks.reject("prefix", "be given along with prefix_noise or prefix_offsets", "None")
        return
    checks.tensor("prefix", prefix, wide)
    checks.same_device("prefix", prefix, "x", x)
    if noise is not None:
        checks.tensor("prefix_noise", noise, wide)
        checks.like("prefix_noise", noise, "prefix", prefix)
    if starts is not None:
        _check_offsets("prefix_offsets", starts, x)
        checks.shape("prefix_offsets", starts, (rows + 1,))
        if prefix.dim() != 1:
            checks.reject("prefix", "be flat when prefix_offsets are given", f"shape {list(prefix.shape)}")
    elif tensors.row_offsets is not None:
        checks.reject("prefix_offsets", "be given along with row_offsets and prefix", "None")
    else:
        _check_leading(x, prefix)


def _check_leading(x: torch.Tensor, prefix: torch.Tensor):
    """prefix [B, C, k, ...] holds the first k of x [B, C, n, ...], so that it leads every row."""
    same = prefix.shape[:2] == x.shape[:2] and prefix.shape[3:] == x.shape[3:] and prefix.dim() == x.dim() > 2
    if not same or prefix.shape[2] > x.shape[2]:
        checks.reject("prefix", f"be [B, C, k, ...] like x {list(x.shape)}", f"shape {list(prefix.shape)}")


def _check_offsets(name: str, offsets: torch.Tensor, x: torch.Tensor):
    checks.tensor(name, offsets, (torch.int64,), 1)
    checks.same_device(name, offsets, "x", x)


def _check_values(tensors: Tensors, rows: int):
    """What only the numbers inside the offsets tell: on the CPU, elsewhere under FLEXKERNELS_CHECK=1."""
    x, prefix = tensors.x, tensors.prefix
    if (tensors.row_offsets is None and tensors.prefix_offsets is None) or not checks.values_are_checked(x):
        return
    if tensors.row_offsets is not None:
        checks.offsets("row_offsets", tensors.row_offsets.cpu(), x.numel())
    if tensors.prefix_offsets is not None:
        checks.offsets("prefix_offsets", tensors.prefix_offsets.cpu(), prefix.numel())
        if bool((tensors.prefix_offsets.diff() > Rows(rows, tensors.row_offsets, x).starts.diff()).any()):
            checks.reject("prefix_offsets", "give no row more than its elements", tensors.prefix_offsets.tolist())


# the ops


def _needs_gradient(tensors: Tensors) -> bool:
    if not torch.is_grad_enabled():
        return False
    every = (*tensors[:8], *tensors.more_x, *tensors.past)
    return any(value is not None and value.requires_grad for value in every)


def _results(x_next, momentum_next, v, numbers: Numbers, return_velocity: bool):
    results = x_next, momentum_next if numbers.momentum else None
    return (*results, v) if return_velocity else results


def _update_impl(*args):
    x_next, momentum_next, v = _update_fake(*args)
    _update(args, x_next, momentum_next, v)
    return x_next, momentum_next, v


def _update_inplace_impl(*args):
    _, momentum_next, v = _update_fake(*args)
    _update(args, args[0], momentum_next, v)
    return momentum_next, v


def _update_inplace_fake(*args):
    return _update_fake(*args)[1:]


def _update(args, x_next, momentum_next, v):
    """Fills x_next, which may be x, and the other two where they are asked for."""
    tensors, rows, numbers, return_velocity = _split(args)
    _check_values(tensors, rows)
    if x_next.numel() == 0:
        return
    flat = _contiguous(tensors)
    if flat.prefix is not None and flat.prefix_offsets is None:
        flat = flat._replace(prefix_offsets=Rows(rows, None, flat.prefix).starts)
    momentum_next = momentum_next.view(-1) if numbers.momentum else None
    legacy.launch(
        "flow_update", *flat, rows, *numbers, x_next.view(-1), momentum_next, v.view(-1) if return_velocity else None
    )


def _contiguous(tensors: Tensors) -> Tensors:
    """Flat and contiguous."""
    one_each = (None if value is None else value.contiguous().view(-1) for value in tensors[:8])
    return Tensors(*one_each, *([value.contiguous().view(-1) for value in several] for several in tensors[8:]))


def _update_fake(*args):
    tensors, _, numbers, return_velocity = _split(args)
    x = tensors.x
    # a result that does not exist is an empty tensor: an op cannot return None
    momentum_next = x.new_empty(x.shape if numbers.momentum else (0,), dtype=torch.float32)
    v = x.new_empty(x.shape if return_velocity else (0,), dtype=torch.float32)
    return x.new_empty(x.shape), momentum_next, v


_TENSORS, _NUMBERS = len(Tensors._fields), len(Numbers._fields)


def _split(args) -> tuple[Tensors, int, Numbers, bool]:
    """The op's arguments as Tensors, the number of rows, Numbers, return_velocity."""
    end = _TENSORS + 1 + _NUMBERS
    return Tensors._make(args[:_TENSORS]), args[_TENSORS], Numbers._make(args[_TENSORS + 1 : end]), args[end]


def _update_setup(ctx, inputs, output):
    tensors, ctx.rows, ctx.numbers, ctx.return_velocity = _split(inputs)
    ctx.x_dtype, ctx.state_dtypes = tensors.x.dtype, [value.dtype for value in tensors.more_x]
    # x_next is linear in the states and the past velocities, so they are not kept
    ctx.save_for_backward(*tensors[1:8])
    ctx.set_materialize_grads(False)
    unused = [output[1]] * (not ctx.numbers.momentum) + [output[2]] * (not ctx.return_velocity)
    ctx.mark_non_differentiable(*unused)


def _update_backward(ctx, grad_x_next, grad_momentum_next, grad_velocity):
    saved = Tensors(None, *ctx.saved_tensors)
    shape, numbers = saved.v_cond.shape, ctx.numbers
    flat, row = flatten(saved, torch.float32), Rows(ctx.rows, saved.row_offsets, saved.v_cond)
    grad_x_next = torch.zeros_like(flat.v_cond) if grad_x_next is None else grad_x_next.reshape(-1).float()
    if grad_momentum_next is not None:
        grad_momentum_next = grad_momentum_next.reshape(-1) if numbers.momentum else None
    if grad_velocity is not None:
        grad_velocity = grad_velocity.reshape(-1) if ctx.return_velocity else None
    grads = update_backward(flat, row, numbers, grad_x_next, grad_momentum_next, grad_velocity)
    states = [g.view(shape).to(ctx.x_dtype) for g in (grads.x, *grads.more_x)]
    rest = (None if g is None else g.view(t.shape).to(t.dtype) for g, t in zip(grads[1:8], saved[1:8], strict=True))
    past = [g.view(shape) for g in grads.past]
    # autograd takes an empty list of numbers for one of tensors
    numbers = Numbers(*[None] * _NUMBERS)._replace(past_b=None if numbers.past_b else [])
    return states[0], *rest, states[1:], past, None, *numbers, None


_ARGUMENTS = (
    "Tensor v_cond, Tensor? v_uncond, Tensor? momentum_buffer, Tensor? row_offsets, Tensor? prefix, "
    "Tensor? prefix_offsets, Tensor? prefix_noise, Tensor[] more_x, Tensor[] past, SymInt rows, float[] a, float b, "
    "float[] past_b, int guidance, float scale, float threshold, float eta, float momentum, float rescale, "
    "float prefix_time, bool return_velocity"
)
_update_op = legacy.define(
    "flow_update", f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _update_impl, _update_fake
)
# without a gradient: asking every argument whether it needs one takes an op with autograd longer than a small update
_update_inference_op = legacy.define(
    "flow_update_inference", f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _update_impl, _update_fake
)
_update_inplace_op = legacy.define(
    "flow_update_", f"(Tensor(a!) x, {_ARGUMENTS}) -> (Tensor, Tensor)", _update_inplace_impl, _update_inplace_fake
)
legacy.define_autograd("flow_update", _update_backward, _update_setup)


# backends: each fills x_next, momentum_next and velocity (or None) from flat, contiguous tensors; x_next may be x; a
# prefix comes with offsets


def flow_update_reference(*args):
    (x_next, momentum_next, v_out), (tensors, rows, numbers, _) = args[-3:], _split(args)
    flat, row = flatten(tensors, torch.float32), Rows(rows, tensors.row_offsets, x_next)
    v = velocity(flat, row, numbers)
    out = combine(flat, numbers, v)
    if flat.prefix is not None:
        out.index_copy_(0, prefix_target(flat, row), prefix_values(flat, numbers.prefix_time))
    if momentum_next is not None:
        momentum_next.copy_(direction(flat, numbers))
    if v_out is not None:
        v_out.copy_(v)
    x_next.copy_(out)


def flow_update_native(*args):
    torch.ops.flexkernels_native.flow_update(*args)


def flow_update_triton(*args):
    from .triton import flow

    tensors, rows, numbers, _ = _split(args)
    flow.flow_update_triton(tensors, rows, numbers, *args[-3:])


legacy.register("flow_update", "reference", flow_update_reference)
legacy.register("flow_update", "cpu", flow_update_native)
legacy.register("flow_update", "triton", flow_update_triton)
legacy.register("flow_update", "cuda", flow_update_native)

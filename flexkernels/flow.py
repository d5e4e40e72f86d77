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

from . import checks, library
from .flow_math import (
    GUIDANCE_APG,
    GUIDANCE_CFG,
    MAX_TERMS,
    NO_GUIDANCE,
    NUMBERS,
    SCALARS,
    Numbers,
    Rows,
    Tensors,
    count_rows,
    empty_results,
    flatten,
    split,
    update,
    update_backward,
)

# kind, scale, threshold, eta, momentum, rescale
_NO_GUIDANCE = (NO_GUIDANCE, 1.0, 0.0, 0.0, 0.0, 0.0)


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
        _keep_numbers(self, GUIDANCE_CFG, 0.0, 0.0, 0.0, float(self.rescale))


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
        _keep_numbers(self, GUIDANCE_APG, float(self.threshold), float(self.eta), float(self.momentum), 0.0)


def _check_scale(scale):
    if not callable(scale):
        checks.finite("guidance scale", scale)


def _keep_numbers(guidance: CFG | APG, kind: int, *rest: float):
    """Makes a guidance's part of the op's arguments once, not in every update; None where its scale is a function."""
    scale = guidance.scale
    numbers = None if callable(scale) else (kind, float(scale), *rest)
    object.__setattr__(guidance, "_numbers", numbers)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Conditioning values that an update writes over the first elements of each row.

    values: float32 [B, C, k, ...] for an x [B, C, n, ...], or flat with offsets.
    offsets: int64 [rows + 1], row r taking the values offsets[r] .. offsets[r + 1]; they go with row_offsets.
    noise, time: the row takes (1 - time) * values + time * noise, time from 0 to 1, or plain values where no noise
        (float32, like values) is given.
    Raises TypeError or ValueError where these are no tensors and no such number.
    """

    values: torch.Tensor
    offsets: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    time: float = 0.0

    def __post_init__(self):
        checks.tensor("Prefix values", self.values)
        for name, value in (("offsets", self.offsets), ("noise", self.noise)):
            if value is not None:
                checks.tensor(f"Prefix {name}", value)
        if checks.at_least("Prefix time", self.time, 0) > 1:
            checks.reject("Prefix time", "be at most 1", self.time)


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
    prefix: Prefix | None = None,
    return_velocity: bool = False,
    scalars: torch.Tensor | None = None,
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
    prefix: conditioning values, which overwrite the first elements of each row.
    scalars: float32 [9] on x's device, read there in place of numbers given here: three of a, b, three of past_b, the
        guidance's scale and the prefix's time (`solvers.scalars`), so that a captured update can be replayed with
        others. How many a and past_b there are is as given. For float32 states, without a gradient.

    Returns x_next in x's shape and dtype, and the momentum buffer for the next update (float32, x's shape) when
    guidance is APG with a momentum, else None; with return_velocity also v (float32, x's shape), which the prefix does
    not touch. Differentiable in every float tensor. Arithmetic is in float32. States but the first and past velocities
    whose number is 0 are not read. Empty rows are left out; an empty x gives empty results.
    torch.compile takes the numbers as constants: a new b, scale or prefix time compiles anew, new sizes do not.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers. Offsets are checked on the CPU;
    elsewhere that would wait for the device and is done under FLEXKERNELS_CHECK=1 alone, and offsets out of order
    leave elements of the results unwritten.
    Source: arXiv 2410.02416, algorithm 1, with norms per channel as in VideoFlexTok (arXiv 2604.12887).
    """
    terms, b = _terms(x, a, past, past_b), _number("b", b)
    settings = guidance, momentum_buffer, row_offsets, prefix, return_velocity, scalars
    arguments = _arguments(*terms, v_cond, v_uncond, b, *settings)
    if scalars is not None and torch.is_grad_enabled() and library.needs_gradient(arguments):
        _reject_gradient()
    return _results(arguments, *_flow_update_op(*arguments))


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
    prefix: Prefix | None = None,
    return_velocity: bool = False,
    scalars: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """`flow_update` that writes x_next into x[0], which must be contiguous and share no memory with the other tensors.

    Same arguments, results (the first is x[0]) and errors; not differentiable: ValueError where a tensor needs a
    gradient.
    """
    terms, b = _terms(x, a, past, past_b), _number("b", b)
    settings = guidance, momentum_buffer, row_offsets, prefix, return_velocity, scalars
    arguments = _arguments(*terms, v_cond, v_uncond, b, *settings)
    return _results(arguments, x[0], *_flow_update_inplace_op(*arguments))


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
    prefix: Prefix | None = None,
    return_velocity: bool = False,
    scalars: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The specification of `flow_update` in plain, differentiable PyTorch; it takes float64 too and computes so."""
    terms, b = _terms(x, a, past, past_b), _number("b", b)
    settings = guidance, momentum_buffer, row_offsets, prefix, return_velocity, scalars
    arguments = _arguments(*terms, v_cond, v_uncond, b, *settings)
    _check_flow_update(*arguments, floats=(*checks.FLOATS, torch.float64), wide=(torch.float32, torch.float64))
    double = torch.float64 in (x[0].dtype, v_cond.dtype)
    return _results(arguments, *update(*split(arguments), torch.float64 if double else torch.float32))


def flow_step(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    dt: float,
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: Prefix | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Euler's step x + dt * v with the guided velocity v: `flow_update` of one state, which explains the arguments.

    x: one tensor. dt: step in time, negative when time runs from noise (1) to clean (0).
    Returns x_next and the momentum buffer for the next step, or None without a momentum.
    """
    terms, b = (x, [], [], _ONE, ()), _number("dt", dt)
    arguments = _arguments(*terms, v_cond, v_uncond, b, guidance, momentum_buffer, row_offsets, prefix, False, None)
    return _results(arguments, *_flow_update_op(*arguments))


def flow_step_ref(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    v_uncond: torch.Tensor | None = None,
    *,
    dt: float,
    guidance: CFG | APG | None = None,
    momentum_buffer: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    prefix: Prefix | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification of `flow_step` in plain, differentiable PyTorch; it takes float64 too and then computes so."""
    return flow_update_ref(
        (x,),
        _ONE,
        v_cond,
        v_uncond,
        b=_number("dt", dt),
        guidance=guidance,
        momentum_buffer=momentum_buffer,
        row_offsets=row_offsets,
        prefix=prefix,
    )


# the op's arguments: what these could not tell any more is refused here


# the numbers of one state, and what stands for no prefix
_ONE = (1.0,)
_NO_PREFIX = (None, None, None, 0.0)


def _arguments(
    x, more_x, past, a, past_b, v_cond, v_uncond, b, guidance, momentum_buffer, row_offsets, prefix, return_velocity,
    scalars,
) -> tuple:  # fmt: skip
    """Those of the op's schema."""
    numbers = _NO_GUIDANCE if guidance is None else _guidance_numbers(guidance)
    values, offsets, noise, time = _NO_PREFIX if prefix is None else _prefix_arguments(prefix)
    return (
        x,
        v_cond,
        v_uncond,
        momentum_buffer,
        row_offsets,
        values,
        offsets,
        noise,
        scalars,
        more_x,
        past,
        a,
        b,
        past_b,
        *numbers,
        time,
        return_velocity,
    )


def _prefix_arguments(prefix: Prefix) -> tuple:
    if not isinstance(prefix, Prefix):
        checks.reject("prefix", "be a Prefix or None", type(prefix).__name__, TypeError)
    return prefix.values, prefix.offsets, prefix.noise, float(prefix.time)


def _guidance_numbers(guidance) -> tuple[int, float, float, float, float, float]:
    """kind, scale, threshold, eta, momentum, rescale."""
    if not isinstance(guidance, (CFG, APG)):
        checks.reject("guidance", "be CFG, APG or None", type(guidance).__name__, TypeError)
    if guidance._numbers is None:
        checks.reject(
            "guidance scale", "be a number in one step (call it with the time before)", "a function", TypeError
        )
    return guidance._numbers


def _number(name: str, value) -> float:
    # what torch would take for a float is more than a number
    return value if type(value) is float and value - value == 0 else checks.finite(name, value)


def _terms(x, a, past, past_b) -> tuple:
    """x[0], the other states, the past velocities, and the numbers of both."""
    for name, value in (("x", x), ("past", past)):
        if not isinstance(value, (list, tuple)):
            checks.reject(name, "be a list or tuple of tensors", type(value).__name__, TypeError)
    if not 1 <= len(x) <= MAX_TERMS:
        checks.reject("x", f"hold 1 to {MAX_TERMS} tensors", len(x))
    if len(past) > MAX_TERMS:
        checks.reject("past", f"hold at most {MAX_TERMS} tensors", len(past))
    return x[0], list(x[1:]), list(past), _weights("a", a, "x", len(x)), _weights("past_b", past_b, "past", len(past))


def _weights(name: str, weights, of: str, count: int) -> list[float]:
    if not isinstance(weights, (list, tuple)):
        checks.reject(name, "be a list or tuple of numbers", type(weights).__name__, TypeError)
    if len(weights) != count:
        checks.reject(name, f"have {count} entries, one for each of {of}", len(weights))
    return [_number(name, weight) for weight in weights]


def _results(arguments: tuple, x_next, momentum_next, v):
    momentum, return_velocity = arguments[-4], arguments[-1]
    results = x_next, momentum_next if momentum else None
    return (*results, v) if return_velocity else results


# checks


def _check_flow_update(*args, floats=checks.FLOATS, wide=(torch.float32,)):
    """Everything that shapes and dtypes tell; `floats` are the dtypes of x and v, `wide` those of the rest."""
    tensors, numbers, _ = split(args)
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
    _check_buffer(tensors, numbers, wide)
    _check_rows(x, tensors.row_offsets)
    _check_prefix(tensors, wide)
    if tensors.scalars is not None:
        checks.tensor("x with scalars", x, wide)
        checks.tensor("scalars", tensors.scalars, (torch.float32,))
        checks.shape("scalars", tensors.scalars, (SCALARS,))
        checks.same_device("scalars", tensors.scalars, "x", x)


def _check_flow_update_inplace(*args):
    _check_flow_update(*args)
    if not args[0].is_contiguous():
        checks.reject("x[0]", "be contiguous to be written in place", f"strides {args[0].stride()}")


def _check_buffer(tensors: Tensors, numbers: Numbers, wide):
    buffer = tensors.momentum_buffer
    if buffer is None:
        if numbers.momentum:
            checks.reject("momentum_buffer", "be given with a momentum (zeros in the first step)", "None")
        return
    if numbers.guidance != GUIDANCE_APG:
        checks.reject("momentum_buffer", "be None unless guidance is APG", "a tensor")
    checks.tensor("momentum_buffer", buffer, wide)
    checks.like("momentum_buffer", buffer, "x", tensors.x)


def _check_rows(x: torch.Tensor, row_offsets: torch.Tensor | None):
    if row_offsets is None:
        if x.dim() < 2:
            checks.reject("x", "have the shape [B, C, ...] when there are no row_offsets", list(x.shape))
        return
    _check_offsets("row_offsets", row_offsets, x)
    if x.dim() != 1:
        checks.reject("x", "be flat [total] when row_offsets are given", f"shape {list(x.shape)}")
    if len(row_offsets) == 0:
        checks.reject("row_offsets", "have rows + 1 entries", 0)


def _check_prefix(tensors: Tensors, wide):
    x, values, noise, offsets = tensors.x, tensors.prefix, tensors.prefix_noise, tensors.prefix_offsets
    if values is None:
        return
    checks.tensor("prefix.values", values, wide)
    checks.same_device("prefix.values", values, "x", x)
    if noise is not None:
        checks.tensor("prefix.noise", noise, wide)
        checks.like("prefix.noise", noise, "prefix.values", values)
    if offsets is not None:
        _check_offsets("prefix.offsets", offsets, x)
        checks.shape("prefix.offsets", offsets, (count_rows(tensors) + 1,))
        if values.dim() != 1:
            checks.reject("prefix.values", "be flat when there are prefix.offsets", f"shape {list(values.shape)}")
    elif tensors.row_offsets is not None:
        checks.reject("prefix.offsets", "be given along with row_offsets", "None")
    else:
        _check_leading(x, values)


def _check_leading(x: torch.Tensor, values: torch.Tensor):
    """values [B, C, k, ...] are for the first k of x [B, C, n, ...], so that they lead every row."""
    same = values.shape[:2] == x.shape[:2] and values.shape[3:] == x.shape[3:] and values.dim() == x.dim() > 2
    if not same or values.shape[2] > x.shape[2]:
        checks.reject("prefix.values", f"be [B, C, k, ...] like x {list(x.shape)}", f"shape {list(values.shape)}")


def _check_offsets(name: str, offsets: torch.Tensor, x: torch.Tensor):
    checks.tensor(name, offsets, (torch.int64,), 1)
    checks.same_device(name, offsets, "x", x)


def _check_values(*args):
    """What only the numbers inside the offsets tell."""
    tensors, _, _ = split(args)
    if tensors.row_offsets is not None:
        checks.offsets("row_offsets", tensors.row_offsets.cpu(), tensors.x.numel())
    if tensors.prefix_offsets is not None:
        checks.offsets("prefix.offsets", tensors.prefix_offsets.cpu(), tensors.prefix.numel())
        lengths = Rows(count_rows(tensors), tensors.row_offsets, tensors.x).starts.diff()
        if bool((tensors.prefix_offsets.diff() > lengths).any()):
            checks.reject("prefix.offsets", "give no row more than its elements", tensors.prefix_offsets.tolist())


# the ops


def _flow_update_reference(*args):
    return update(*split(args))


def _flow_update_inplace_reference(x, *rest):
    x_next, momentum_next, v = _flow_update_reference(x, *rest)
    x.copy_(x_next)
    return momentum_next, v


def _flow_update_fake(*args):
    return args[0].new_empty(args[0].shape), *empty_results(*split(args))


def _flow_update_inplace_fake(*args):
    return empty_results(*split(args))


def _reject_gradient():
    checks.reject("scalars", "be None where a gradient is asked for", "a tensor")


def _flow_update_setup(ctx, inputs, output):
    tensors, ctx.numbers, ctx.return_velocity = split(inputs)
    if tensors.scalars is not None:
        # of the op itself: `flow_update` says so before it launches
        _reject_gradient()
    ctx.x_dtype = tensors.x.dtype
    # x_next is linear in the states and the past velocities, so they are not kept
    ctx.save_for_backward(*tensors[1:8])
    ctx.set_materialize_grads(False)
    unused = [output[1]] * (not ctx.numbers.momentum) + [output[2]] * (not ctx.return_velocity)
    ctx.mark_non_differentiable(*unused)


def _flow_update_backward(ctx, grad_x_next, grad_momentum_next, grad_velocity):
    saved = Tensors(None, *ctx.saved_tensors)
    v_cond, numbers = saved.v_cond, ctx.numbers
    shape = v_cond.shape
    rows = count_rows(saved._replace(x=v_cond))
    flat, row = flatten(saved, torch.float32), Rows(rows, saved.row_offsets, v_cond)
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
    numbers = Numbers(*[None] * NUMBERS)._replace(past_b=None if numbers.past_b else [])
    return states[0], *rest, None, states[1:], past, *numbers, None


_ARGUMENTS = (
    "Tensor v_cond, Tensor? v_uncond, Tensor? momentum_buffer, Tensor? row_offsets, Tensor? prefix, "
    "Tensor? prefix_offsets, Tensor? prefix_noise, Tensor? scalars, Tensor[] more_x, Tensor[] past, float[] a, "
    "float b, float[] past_b, int guidance, float scale, float threshold, float eta, float momentum, float rescale, "
    "float prefix_time, bool return_velocity"
)
_flow_update_op = library.Op(
    "flow_update",
    f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    check=_check_flow_update,
    check_values=_check_values,
    reference=_flow_update_reference,
    fake=_flow_update_fake,
    triton="flow",
    setup_context=_flow_update_setup,
    backward=_flow_update_backward,
    lists=True,
)
_flow_update_inplace_op = library.Op(
    "flow_update_",
    f"(Tensor(a!) x, {_ARGUMENTS}) -> (Tensor, Tensor)",
    check=_check_flow_update_inplace,
    check_values=_check_values,
    reference=_flow_update_inplace_reference,
    fake=_flow_update_inplace_fake,
    triton="flow",
    jvp=None,
)

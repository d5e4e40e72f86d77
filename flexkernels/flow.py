"""One guided step of a flow ODE in one kernel: `flow_step`, its reference, and the guidance settings `CFG` and `APG`.

Per row (one channel of one sample), with d = v_cond - v_uncond + momentum * buffer:
    CFG: v = v_uncond + scale * (v_cond - v_uncond)
    APG: v = v_cond + (scale - 1) * (d_orth + eta * d_par), d first shortened to `threshold`, d_par along v_cond
and then x_next = x + dt * v, with the conditioning prefix written over the first elements of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import checks, library
from .flow_math import (
    GUIDANCE_APG,
    GUIDANCE_CFG,
    NO_GUIDANCE,
    Numbers,
    Rows,
    Tensors,
    direction,
    flatten,
    prefix_target,
    prefix_values,
    step_backward,
    velocity,
)


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (arXiv 2207.12598). `scale` is a number, 1 for none, or a function of the time t."""

    scale: float | Callable[[float], float]

    def __post_init__(self):
        _check_scale(self.scale)


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
    """x + dt * v with the guided velocity v, in one pass over memory; differentiable in every float tensor.

    x: [B, C, ...] float32, bfloat16 or float16, whose B * C rows are guided each by itself; or flat [total] with
        row_offsets int64 [rows + 1], row r being elements row_offsets[r] .. row_offsets[r + 1] (ragged batches).
    v_cond, v_uncond: velocities like x, in one of those dtypes; v_uncond only with guidance, which needs it.
    dt: step in time, negative when time runs from noise (1) to clean (0).
    guidance: None, CFG or APG with a number as scale (resolve a function of t before).
    momentum_buffer: float32 like x, the buffer that the step before returned; None means zeros.
    prefix: float32 conditioning values. [B, C, ...], overwriting the first elements of each row, or flat with
        prefix_offsets int64 [rows + 1]. They become (1 - prefix_time) * prefix + prefix_time * prefix_noise, or
        plain prefix where no prefix_noise (float32, like prefix) is given.

    Returns x_next in x's shape and dtype, and the momentum buffer for the next step (float32, x's shape) when guidance
    is APG with a momentum, else None. Arithmetic is in float32. Empty rows are left out; an empty x gives an empty x.
    torch.compile takes the numbers as constants: a new dt, scale or prefix_time compiles anew, new sizes do not.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers. Offsets are checked on the CPU alone;
    elsewhere that would wait for the device, and offsets out of order leave elements of the results unwritten.
    Source: arXiv 2410.02416, algorithm 1, with norms per channel as in VideoFlexTok (arXiv 2604.12887).
    """
    tensors = Tensors(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise)
    rows, numbers = _check_step(tensors, dt, guidance, prefix_time, checks.FLOATS, (torch.float32,))
    x_next, momentum_next = _step_op(*tensors, rows, *numbers)
    return x_next, momentum_next if numbers.momentum else None


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
    tensors = Tensors(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets, prefix_noise)
    rows, numbers = _check_step(
        tensors, dt, guidance, prefix_time, (*checks.FLOATS, torch.float64), (torch.float32, torch.float64)
    )
    flat = flatten(tensors, torch.float64 if torch.float64 in (x.dtype, v_cond.dtype) else torch.float32)
    row = Rows(rows, row_offsets, x)
    out = flat.x + dt * velocity(flat, row, numbers)
    if prefix is not None:
        out = out.index_copy(0, prefix_target(flat, row), prefix_values(flat, prefix_time))
    return out.view(x.shape).to(x.dtype), direction(flat, numbers).view(x.shape) if numbers.momentum else None


# validation


def _check_step(tensors: Tensors, dt, guidance, prefix_time, floats, wide) -> tuple[int, Numbers]:
    """Checks everything that shapes and dtypes tell; `floats` are the dtypes of x and v, `wide` those of the rest."""
    x, v_cond, v_uncond = tensors[:3]
    checks.tensor("x", x, floats)
    checks.tensor("v_cond", v_cond, floats)
    checks.like("v_cond", v_cond, "x", x)
    numbers = _check_guidance(dt, guidance, prefix_time)
    if numbers.guidance == NO_GUIDANCE and v_uncond is not None:
        checks.reject("v_uncond", "be None without guidance", "a tensor")
    if numbers.guidance != NO_GUIDANCE:
        checks.tensor("v_uncond", v_uncond, (v_cond.dtype,))
        checks.like("v_uncond", v_uncond, "x", x)
    if tensors.momentum_buffer is not None:
        if numbers.guidance != GUIDANCE_APG:
            checks.reject("momentum_buffer", "be None unless guidance is APG", "a tensor")
        checks.tensor("momentum_buffer", tensors.momentum_buffer, wide)
        checks.like("momentum_buffer", tensors.momentum_buffer, "x", x)
    rows = _check_rows(x, tensors.row_offsets)
    _check_prefix(tensors, rows, wide)
    return rows, numbers


def _check_guidance(dt, guidance, prefix_time) -> Numbers:
    dt = checks.finite("dt", dt)
    prefix_time = checks.at_least("prefix_time", prefix_time, 0)
    if prefix_time > 1:
        checks.reject("prefix_time", "be at most 1", prefix_time)
    if guidance is None:
        return Numbers(dt, NO_GUIDANCE, 1.0, 0.0, 0.0, 0.0, prefix_time)
    if not isinstance(guidance, (CFG, APG)):
        checks.reject("guidance", "be CFG, APG or None", type(guidance).__name__, TypeError)
    if callable(guidance.scale):
        checks.reject(
            "guidance scale", "be a number in one step (call it with the time before)", "a function", TypeError
        )
    scale = float(guidance.scale)
    if isinstance(guidance, CFG):
        return Numbers(dt, GUIDANCE_CFG, scale, 0.0, 0.0, 0.0, prefix_time)
    settings = float(guidance.threshold), float(guidance.eta), float(guidance.momentum)
    return Numbers(dt, GUIDANCE_APG, scale, *settings, prefix_time)


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
    """What only the numbers inside the offsets tell; on the CPU alone, where looking costs no wait."""
    x, prefix = tensors.x, tensors.prefix
    if x.device.type != "cpu":
        return
    if tensors.row_offsets is not None:
        checks.offsets("row_offsets", tensors.row_offsets, x.numel())
    if tensors.prefix_offsets is not None:
        checks.offsets("prefix_offsets", tensors.prefix_offsets, prefix.numel())
        if bool((tensors.prefix_offsets.diff() > Rows(rows, tensors.row_offsets, x).starts.diff()).any()):
            checks.reject("prefix_offsets", "give no row more than its elements", tensors.prefix_offsets.tolist())


# the op


def _step_impl(*args):
    tensors, rows, numbers = _split(args)
    x_next, momentum_next = _step_fake(*args)
    _check_values(tensors, rows)
    if x_next.numel() == 0:
        return x_next, momentum_next
    flat = Tensors(*(None if value is None else value.contiguous().view(-1) for value in tensors))
    if flat.prefix is not None and flat.prefix_offsets is None:
        flat = flat._replace(prefix_offsets=Rows(rows, None, flat.prefix).starts)
    library.launch(
        "flow_step", *flat, rows, *numbers, x_next.view(-1), momentum_next.view(-1) if numbers.momentum else None
    )
    return x_next, momentum_next


def _step_fake(*args):
    tensors, _, numbers = _split(args)
    x_next = tensors.x.new_empty(tensors.x.shape)
    # a result that does not exist is an empty tensor: an op cannot return None
    return x_next, tensors.x.new_empty(tensors.x.shape if numbers.momentum else (0,), dtype=torch.float32)


def _split(args) -> tuple[Tensors, int, Numbers]:
    """The op's arguments as Tensors, the number of rows, Numbers."""
    count = len(Tensors._fields)
    return Tensors(*args[:count]), args[count], Numbers(*args[count + 1 : count + 1 + len(Numbers._fields)])


def _step_setup(ctx, inputs, output):
    tensors, ctx.rows, ctx.numbers = _split(inputs)
    ctx.x_dtype = tensors.x.dtype
    # x_next is linear in x, so x itself is not kept
    ctx.save_for_backward(*tensors[1:])
    ctx.set_materialize_grads(False)
    if not ctx.numbers.momentum:
        ctx.mark_non_differentiable(output[1])


def _step_backward(ctx, grad_x_next, grad_momentum_next):
    saved = Tensors(None, *ctx.saved_tensors)
    flat, row = flatten(saved, torch.float32), Rows(ctx.rows, saved.row_offsets, saved.v_cond)
    grad_x_next = torch.zeros_like(flat.v_cond) if grad_x_next is None else grad_x_next.reshape(-1).float()
    if grad_momentum_next is not None:
        grad_momentum_next = grad_momentum_next.reshape(-1) if ctx.numbers.momentum else None
    grads = step_backward(flat, row, ctx.numbers, grad_x_next, grad_momentum_next)
    grad_x = grads.x.view(saved.v_cond.shape).to(ctx.x_dtype)
    rest = (None if g is None else g.view(t.shape).to(t.dtype) for g, t in zip(grads[1:], saved[1:], strict=True))
    return grad_x, *rest, None, *[None] * len(Numbers._fields)


_step_op = library.define(
    "flow_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? momentum_buffer, Tensor? row_offsets, Tensor? prefix, "
    "Tensor? prefix_offsets, Tensor? prefix_noise, SymInt rows, float dt, int guidance, float scale, "
    "float threshold, float eta, float momentum, float prefix_time) -> (Tensor, Tensor)",
    _step_impl,
    _step_fake,
)
library.define_autograd("flow_step", _step_backward, _step_setup)


# backends: each fills x_next and momentum_next (or None) from flat, contiguous tensors; a prefix comes with offsets


def flow_step_reference(*args):
    tensors, rows, numbers = _split(args)
    x_next, momentum_next = args[-2:]
    flat, row = flatten(tensors, torch.float32), Rows(rows, tensors.row_offsets, x_next)
    out = flat.x + numbers.dt * velocity(flat, row, numbers)
    if flat.prefix is not None:
        out.index_copy_(0, prefix_target(flat, row), prefix_values(flat, numbers.prefix_time))
    x_next.copy_(out)
    if momentum_next is not None:
        momentum_next.copy_(direction(flat, numbers))


def flow_step_native(*args):
    tensors, rows, numbers = _split(args)
    torch.ops.flexkernels_native.flow_step(
        *tensors[:5], rows, *numbers[:-1], *tensors[5:], numbers.prefix_time, *args[-2:]
    )


def flow_step_triton(*args):
    from .triton import flow

    tensors, rows, numbers = _split(args)
    flow.flow_step_triton(tensors, rows, numbers, *args[-2:])


library.register("flow_step", "reference", flow_step_reference)
library.register("flow_step", "cpu", flow_step_native)
library.register("flow_step", "triton", flow_step_triton)
library.register("flow_step", "cuda", flow_step_native)

"""A call of every op for test_derivatives.py: its differentiable tensors, the op as a function of them, and its
specification. A new op needs an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flow_cases import GUIDANCE, draw, draw_ragged, tensors_of, with_tensors

import flexkernels
from flexkernels import CFG, library

OPS = library.OPS


@dataclass(frozen=True)
class Example:
    """ours, ref: functions of `tensors` (float32; float64 for `ref`), which return a tensor or several.

    forward: whether it has a forward-mode derivative; otherwise NotImplementedError names the op.
    backward: whether it has a gradient; otherwise `error` is raised, which names the op.
    linear: its second derivatives are 0.
    second: whether it has a second derivative in reverse mode; otherwise NotImplementedError names an op.
    """

    ours: Callable
    ref: Callable
    tensors: list[torch.Tensor] = field(repr=False)
    forward: bool = True
    backward: bool = True
    second: bool = False
    linear: bool = False
    error: type[Exception] = NotImplementedError


def examples(name: str) -> list[Example]:
    torch.manual_seed(0)
    return list(EXAMPLES[name]())


# norms: 5 rows of 12, whose modulation comes from 3 rows of the tables

SEGMENT = torch.tensor([0, 2, 2, 0, 2], dtype=torch.int32)
ORDER, OFFSETS = torch.tensor([0, 3, 1, 2, 4]), torch.tensor([0, 2, 2, 5])
EPS = 1e-3


def rows(count):
    return list(torch.randn(count, 5, 12))


def tables(count):
    return list(torch.randn(count, 3, 12))


def adaln_norm():
    calls = [lambda x, shift, scale, f=f: f(x, shift, scale, SEGMENT, eps=EPS) for f in both("adaln_norm")]
    yield Example(*calls, rows(1) + tables(2))
    yield Example(*both("adaln_norm"), rows(1))


def gated_residual_adaln_norm():
    name = "gated_residual_adaln_norm"
    calls = [lambda x, y, gate, shift, scale, f=f: f(x, y, gate, shift, scale, SEGMENT, eps=EPS) for f in both(name)]
    yield Example(*calls, rows(2) + tables(3))
    yield Example(*both(name), rows(2))


def gated_residual():
    calls = [lambda x, y, gate, f=f: f(x, y, gate, SEGMENT) for f in both("gated_residual")]
    yield Example(*calls, rows(2) + tables(1))


def rms_norm():
    calls = [lambda x, weight, residual, f=f: f(x, weight, residual=residual, eps=EPS) for f in both("rms_norm")]
    yield Example(*calls, [*rows(1), torch.randn(12), *rows(1)])
    yield Example(*both("rms_norm"), [*rows(1), torch.randn(12)])


def swiglu():
    yield Example(*both("swiglu"), rows(1))


def swiglu_backward():
    yield Example(*op_itself("swiglu_backward"), [torch.randn(5, 6), *rows(1)], backward=False)


def norm_backward():
    def arguments(grad_out, grad_sum, v, y, gate, scale):
        return grad_out, grad_sum, v, y, gate, scale, SEGMENT, ORDER, OFFSETS, 3, EPS, False, 1 + 2 + 4 + 8

    calls = [lambda *tensors, f=f: f(*arguments(*tensors)) for f in op_itself("norm_backward")]
    yield Example(*calls, rows(4) + tables(2), backward=False)


# flow


def flow_update():
    for guidance in GUIDANCE.values():
        yield flow_example("flow_step", draw(guidance, (1, 2, 4, 3), prefix=(1, 2, 1, 3)))
    arguments = draw_ragged(GUIDANCE["apg_momentum"])
    x, dt = arguments.pop("x"), arguments.pop("dt")
    others = {"x": (x, torch.randn(x.shape)), "a": [0.7, -0.3], "b": dt, "past": (torch.randn(x.shape),)}
    yield flow_example("flow_update", arguments | others | {"past_b": [0.4], "return_velocity": True})


def flow_update_():
    def ours(v_cond):
        return flexkernels.flow_update_([torch.ones(1, 2, 6)], [1.0], v_cond, b=0.5)[0]

    yield Example(ours, None, [torch.randn(1, 2, 6)], forward=False, backward=False, error=ValueError)


def flow_example(name, arguments):
    named = {n: t for n, t in tensors_of(arguments).items() if t.is_floating_point()}

    def call(function):
        return lambda *tensors: function(**with_tensors(arguments, dict(zip(named, tensors, strict=True))))

    guidance = arguments["guidance"]
    linear = guidance is None or (isinstance(guidance, CFG) and not guidance.rescale)
    return Example(*map(call, both(name)), list(named.values()), second=True, linear=linear)


def both(name: str) -> tuple[Callable, Callable]:
    return getattr(flexkernels, name), getattr(flexkernels, f"{name}_ref")


def op_itself(name: str) -> tuple[Callable, Callable]:
    return OPS[name], OPS[name].reference


EXAMPLES = {
    function.__name__: function
    for function in (
        adaln_norm,
        flow_update,
        flow_update_,
        gated_residual,
        gated_residual_adaln_norm,
        norm_backward,
        rms_norm,
        swiglu,
        swiglu_backward,
    )
}

"""torchdiffeq's `odeint` on a fixed grid: each stage of a step is one fused update, with the same signature.

    from flexkernels.integrations.torchdiffeq import odeint

`explicit_adams` is torchdiffeq's: steps of Adams-Bashforth for an even grid, begun with two steps of `rk4`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from .. import checks
from ..solvers import EULER, HEUN, MIDPOINT, Step, Tableau, adams_bashforth, runge_kutta
from ._update import unguided_update

# torchdiffeq's rk4 is the 3/8 rule
METHODS = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun2": HEUN,
    "heun3": Tableau((0.0, 1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "rk4": Tableau((0.0, 1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
ADAMS = "explicit_adams"
# torchdiffeq's max_order counts one more than the velocities of a step; below, it takes rk4 throughout
ADAMS_MAX_ORDERS = (4, 5)
OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "max_order")

State = tuple[torch.Tensor, ...]


def odeint(
    func: Callable,
    y0: torch.Tensor | State,
    t: torch.Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
) -> torch.Tensor | State:
    """Solves dy/dt = func(t, y), y(t[0]) = y0 by steps from each time to the next.

    func: (0-d tensor, state) -> velocity like the state; its `callback_step(t, y, dt)` is called if it has one.
    y0: float32, bfloat16 or float16 of any shape, or a tuple of such. t: float ``[n]``, strictly rising or falling,
    read by the host once. method: euler, midpoint, heun2, heun3, rk4 or explicit_adams. options: step_size or
    grid_constructor for a grid of its own, between whose points states are interpolated linearly; max_order 4 or 5
    for explicit_adams, which needs it. rtol, atol: accepted, not needed.

    Returns the states at t, ``[n, ...]`` in y0's dtype, or a tuple of them. Arithmetic is in float32. Differentiable
    in y0 and in what func uses, but not in t.

    Raises TypeError or ValueError for another method, dtype or option, an event, or times that need a gradient.
    """
    _check(t, method, event_fn)
    options = _check_options(method, options)
    state = y0 if isinstance(y0, tuple) else (y0,)
    for value in state:
        checks.tensor("y0", value, checks.FLOATS)
    field = _Field(func, state[0].dtype, isinstance(y0, tuple))
    grid = _grid(func, y0, t, options)
    callback = getattr(func, "callback_step", None)
    solution, past, wanted = [state], [], list(t.tolist()[1:])
    direction = 1 if len(t) < 2 or t[1] > t[0] else -1
    for (start, end), (t0, t1) in zip(pairwise(grid), pairwise(grid.tolist()), strict=True):
        if callback is not None:
            callback(start, state if field.is_tuple else state[0], direction * (end - start))
        steps, past = _steps(method, options, t1 - t0, past)
        after, past = _step(field, state, start, end, steps, past)
        while wanted and direction * t1 >= direction * wanted[0]:
            share = (wanted.pop(0) - t0) / (t1 - t0)
            solution.append(after if share == 1 else _between(state, after, share))
        state = after
    states = tuple(torch.stack(values) for values in zip(*solution, strict=True))
    return states if field.is_tuple else states[0]


class _Field:
    """func on tuples of tensors, with the time in the dtype of the state."""

    def __init__(self, func: Callable, dtype: torch.dtype, is_tuple: bool):
        self.func, self.dtype, self.is_tuple = func, dtype, is_tuple

    def __call__(self, t: torch.Tensor, state: State) -> State:
        t = t.to(self.dtype)
        return tuple(self.func(t, state)) if self.is_tuple else (self.func(t, state[0]),)


def _steps(method: str, options: dict[str, Any], dt: float, past: list[State]) -> tuple[list[Step], list[State]]:
    """The updates of one step, and which past velocities they use."""
    if method != ADAMS:
        return runge_kutta(METHODS[method], dt), []
    past = past[-(options["max_order"] - 2) :]
    if len(past) < 2:
        return runge_kutta(METHODS["rk4"], dt), past
    # as if all steps had been of this size
    even = adams_bashforth([float(i) for i in range(len(past) + 2)])
    return [Step((1.0,), dt * even.b, tuple(dt * b for b in even.past_b))], past


def _step(
    field: _Field, state: State, start: torch.Tensor, end: torch.Tensor, steps: Sequence[Step], past: list[State]
) -> tuple[State, list[State]]:
    """The state after the step, and past with the velocity at its start."""
    # of Runge-Kutta, the stages before; of Adams, the steps before
    used = [] if len(steps) > 1 else list(past)
    stage = state
    for i, step in enumerate(steps):
        at = end if step.at == 1 else start + step.at * (end - start)
        velocity = field(at, stage)
        stage = tuple(_update(*parts, step) for parts in zip(state, velocity, _transposed(used, state), strict=True))
        used.append(tuple(value.float() for value in velocity))
        if i == 0:
            first = used[-1]
    return stage, [*past, first]


def _transposed(past: list[State], state: State) -> list[list[torch.Tensor]]:
    return [[each[i] for each in past] for i in range(len(state))]


def _update(y: torch.Tensor, velocity: torch.Tensor, past: list[torch.Tensor], step: Step) -> torch.Tensor:
    if velocity.shape != y.shape:
        checks.reject("func", f"give the shape {list(y.shape)} of the state", list(velocity.shape))
    return unguided_update(y, velocity, step.b, past, step.past_b)


def _between(before: State, after: State, share: float) -> State:
    return before if share == 0 else tuple(torch.lerp(*pair, share) for pair in zip(before, after, strict=True))


def _grid(func: Callable, y0: Any, t: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    if options.get("grid_constructor") is not None:
        grid = options["grid_constructor"](func, y0, t)
        if grid[0] != t[0] or grid[-1] != t[-1]:
            checks.reject("grid_constructor", "give a grid from the first to the last of t", grid.tolist())
        return grid
    if options.get("step_size") is None:
        return t
    step = options["step_size"] * (1 if len(t) < 2 or t[1] > t[0] else -1)
    count = int(torch.ceil((t[-1] - t[0]) / step + 1))
    grid = torch.arange(count, dtype=t.dtype, device=t.device) * step + t[0]
    grid[-1] = t[-1]
    return grid


def _check(t: torch.Tensor, method: str | None, event_fn: Callable | None) -> None:
    checks.tensor("t", t, (*checks.FLOATS, torch.float64), 1)
    if len(t) == 0:
        checks.reject("t", "have at least one time", "none")
    if t.requires_grad:
        checks.reject("t", "need no gradient, as none is computed", "requires_grad=True")
    rises = t.diff() > 0
    if not (rises.all() or (t.diff() < 0).all()):
        checks.reject("t", "rise or fall strictly", t.tolist())
    if method not in METHODS and method != ADAMS:
        checks.reject("method", f"be one of {', '.join(METHODS)}, {ADAMS}", repr(method))
    if event_fn is not None:
        checks.reject("event_fn", "be None, as events are not supported", "a function")


def _check_options(method: str, options: dict[str, Any] | None) -> dict[str, Any]:
    options = dict(options or {})
    for name in options:
        if name not in OPTIONS:
            checks.reject("options", f"be among {', '.join(OPTIONS)}", name)
    if options.get("step_size") is not None and options.get("grid_constructor") is not None:
        checks.reject("step_size", "be None beside grid_constructor", options["step_size"])
    if options.get("interp", "linear") != "linear":
        checks.reject("interp", "be linear", repr(options["interp"]))
    if options.get("perturb", False):
        checks.reject("perturb", "be False, as nothing else is supported", options["perturb"])
    if method == ADAMS and options.get("max_order") not in ADAMS_MAX_ORDERS:
        orders = " or ".join(map(str, ADAMS_MAX_ORDERS))
        checks.reject("max_order", f"be {orders} for {ADAMS}", options.get("max_order"))
    if method != ADAMS and "max_order" in options:
        checks.reject("max_order", f"be given for {ADAMS} alone", options["max_order"])
    return options

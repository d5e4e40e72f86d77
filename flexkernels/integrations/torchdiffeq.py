"""torchdiffeq's `odeint`: on a fixed grid each stage of a step is one fused update; the rest is torchdiffeq's own.

    from flexkernels.integrations.torchdiffeq import odeint

`explicit_adams` is torchdiffeq's: steps of Adams-Bashforth for an even grid, begun with two steps of `rk4`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

# bound here, so that `torchdiffeq.odeint` may be replaced by the one below
from torchdiffeq import odeint as torchdiffeq_odeint

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
# of adaptive solvers: torchdiffeq warns that a fixed step never calls them
UNKNOWN_CALLBACKS = ("callback_accept_step", "callback_reject_step")

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
    """Solves dy/dt = func(t, y), y(t[0]) = y0: torchdiffeq's `odeint`, with its arguments, results and errors.

    On a fixed grid the kernels solve it: method euler, midpoint, heun2, heun3, rk4, or explicit_adams with max_order 4
    or 5; y0 float32, bfloat16 or float16 of any shape, or a tuple of such of one dtype; t float ``[n]``, strictly
    rising or falling, without a gradient, read by the host once; options step_size or grid_constructor, between whose
    points states are interpolated linearly. `callback_step(t, y, dt)` of func is called if it has one. Arithmetic is
    in float32. Differentiable in y0 and in what func uses.

    Anything else (adaptive and implicit methods, events, float64, gradients to t, cubic interpolation, perturb, other
    orders) is handed to torchdiffeq unchanged.

    Returns the states at t, ``[n, ...]`` in y0's dtype, or a tuple of them.

    Raises ValueError where func or grid_constructor gives another shape or range.
    """
    options = dict(options or {})
    if not _served(func, y0, t, method, options, event_fn):
        return torchdiffeq_odeint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options or None, event_fn=event_fn
        )
    state = y0 if isinstance(y0, tuple) else (y0,)
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


def _served(func: Callable, y0: Any, t: Any, method: str | None, options: dict[str, Any], event_fn: Any) -> bool:
    """Whether the kernels solve it: what is malformed is not, and gets torchdiffeq's own error."""
    states = y0 if isinstance(y0, tuple) and y0 else (y0,)
    known = {"step_size", "grid_constructor", "interp", "perturb"} | ({"max_order"} if method == ADAMS else set())
    return (
        (method in METHODS or (method == ADAMS and options.get("max_order") in ADAMS_MAX_ORDERS))
        and event_fn is None
        and options.keys() <= known
        and options.get("interp", "linear") == "linear"
        and not options.get("perturb", False)
        and (options.get("step_size") is None or options.get("grid_constructor") is None)
        and not any(hasattr(func, name) for name in UNKNOWN_CALLBACKS)
        and all(isinstance(state, torch.Tensor) and state.dtype in checks.FLOATS for state in states)
        and len({(state.dtype, state.device) for state in states}) == 1
        and isinstance(t, torch.Tensor)
        and t.is_floating_point()
        and t.dim() == 1
        and len(t) > 0
        and not t.requires_grad
        and t.device == states[0].device
        and bool((t.diff() > 0).all() or (t.diff() < 0).all())
    )

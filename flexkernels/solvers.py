"""Coefficients of flow-ODE solvers for `flow_update`: x_next = sum a_i x_i + b * v + sum past_b_j past_j.

Plain numbers, no tensors. `a` belongs to the states, newest first; `past_b` to the earlier velocities, oldest first:

    for step in runge_kutta(RK4, dt):                      # one step of size dt from x
        v_cond, v_uncond = model(stage, t + step.at * dt)
        stage, _, v = flow_update([x], step.a, v_cond, v_uncond, b=step.b, past=past, past_b=step.past_b, ...,
                                  return_velocity=True)
        past.append(v)                                     # past starts empty; the last stage is the new x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from . import checks
from .flow_math import MAX_TERMS


class Step(NamedTuple):
    """One `flow_update`. `at`: where its velocity is evaluated, as a fraction of the time step, 0 at its start."""

    a: tuple[float, ...]
    b: float
    past_b: tuple[float, ...] = ()
    at: float = 0.0


def scalars(
    a: Sequence[float], b: float, past_b: Sequence[float], scale: float = 1.0, time: float = 0.0
) -> list[float]:
    """The numbers that `flow_update` reads from a float32 tensor of these: a, b and past_b (missing ones as 0), the
    guidance's scale, the prefix's time.

    Raises ValueError for more than three of a or past_b, and for numbers that are not finite.
    """
    row = []
    for name, numbers in (("a", a), ("past_b", past_b)):
        if len(numbers) > MAX_TERMS:
            checks.reject(name, f"have at most {MAX_TERMS} entries", len(numbers))
    for name, numbers, count in (("a", a, MAX_TERMS), ("b", [b], 1), ("past_b", past_b, MAX_TERMS)):
        row += [checks.finite(name, number) for number in numbers] + [0.0] * (count - len(numbers))
    return [*row, checks.finite("scale", scale), checks.finite("time", time)]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Butcher): stage i + 1 is x + dt * sum_j stages[i][j] k_j, the step the same with
    `weights`; k_j is the velocity at the fraction nodes[j] of the step.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = Tableau((0.0,), (), (1.0,))
MIDPOINT = Tableau((0.0, 0.5), ((0.5,),), (0.0, 1.0))
HEUN = Tableau((0.0, 1.0), ((1.0,),), (0.5, 0.5))
RK4 = Tableau((0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def runge_kutta(tableau: Tableau, dt: float) -> list[Step]:
    """The updates of one step of size dt, one for each velocity; all start from the same x, the last gives x_next."""
    dt = checks.finite("dt", dt)
    return [
        Step((1.0,), dt * row[-1], tuple(dt * weight for weight in row[:-1]), at)
        for at, row in zip(tableau.nodes, (*tableau.stages, tableau.weights), strict=True)
    ]


def adams_bashforth(times: Sequence[float]) -> Step:
    """Adams-Bashforth of order len(times) - 1, 1 to 4, for steps of any sizes.

    times: those of the past velocities, oldest first, then the present time and the next one; strictly monotonic.
    The weight of a velocity is the integral of its Lagrange polynomial over the step.
    """
    times = [checks.finite("times", time) for time in times]
    if not 2 <= len(times) <= 5:
        checks.reject("times", "hold 2 to 5 times", len(times))
    steps = [later - earlier for earlier, later in pairwise(times)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        checks.reject("times", "be strictly monotonic", times)
    *nodes, end = times
    dt = end - nodes[-1]
    # nodes in units of dt from the present time, so the step is [0, 1]
    nodes = [(node - nodes[-1]) / dt for node in nodes]
    *past_b, b = (dt * _lagrange_integral(nodes, j) for j in range(len(nodes)))
    return Step((1.0,), b, tuple(past_b))


def _lagrange_integral(nodes: Sequence[float], j: int) -> float:
    """The integral over [0, 1] of the polynomial that is 1 at nodes[j] and 0 at the others."""
    # coefficients, lowest power first
    polynomial = [1.0]
    for node in (node for i, node in enumerate(nodes) if i != j):
        scale = nodes[j] - node
        shifted = [0.0, *polynomial]
        polynomial = [(up - node * low) / scale for up, low in zip(shifted, [*polynomial, 0.0], strict=True)]
    return sum(value / (power + 1) for power, value in enumerate(polynomial))


def dpm2m(t: float, t_next: float, t_last: float | None = None) -> Step:
    """Second-order multistep on the data prediction (DPM-Solver++(2M), arXiv 2211.01095, algorithm 2).

    For the rectified flow x_t = (1 - t) * x0 + t * noise, whose data prediction is x0 = x - t * v, in the variable
    lambda = log((1 - t) / t). Times fall, 1 >= t_last > t > t_next >= 0; t_last, the time of the step before, is None
    in the first step. With it, the update takes the states [x, x_last] and past velocities [v_last], else [x] alone.

    x_next = (t_next / t) x + k ((1 + w) x0 - w x0_last), k = (1 - t_next) - (1 - t) t_next / t and w half the ratio of
    the two steps in lambda. Lambda is infinite at both ends: a step after one from t = 1 and a step to t = 0 have
    w = 0, which is Euler's step.
    """
    t, t_next = checks.finite("t", t), checks.at_least("t_next", t_next, 0)
    if not t_next < t <= 1:
        checks.reject("t", f"lie above t_next, {t_next}, and not above 1", t)
    k = (1 - t_next) - (1 - t) * t_next / t
    if t_last is None:
        return Step((t_next / t + k,), -k * t)
    t_last = checks.finite("t_last", t_last)
    if not t < t_last <= 1:
        checks.reject("t_last", f"lie above t, {t}, and not above 1", t_last)
    w = 0.0
    if t_last < 1 and t_next > 0:
        w = (_log_ratio(t_next) - _log_ratio(t)) / (2 * (_log_ratio(t) - _log_ratio(t_last)))
    return Step((t_next / t + k * (1 + w), -k * w), -k * (1 + w) * t, (k * w * t_last,))


def _log_ratio(t: float) -> float:
    return math.log((1 - t) / t)

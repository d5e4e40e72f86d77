import math
from itertools import pairwise

import pytest
import torch
from helpers import on_every_backend

import flexkernels
from flexkernels import CFG
from flexkernels.solvers import EULER, HEUN, MIDPOINT, RK4, adams_bashforth, dpm2m, runge_kutta

TABLEAUS = {"euler": (EULER, 1), "midpoint": (MIDPOINT, 2), "heun": (HEUN, 2), "rk4": (RK4, 4)}


def linear(x, t):
    """dx/dt = -2 x + t; at time t the solution through x(1) = X1 is `linear_at`."""
    return t - 2 * x


def linear_at(t, x1):
    return (x1 - 0.25) * math.exp(2 - 2 * t) + t / 2 - 0.25


def rotation(x, t):
    """dx/dt = 2 J x on pairs, x [1, 2, n]."""
    return 2 * torch.stack([-x[:, 1], x[:, 0]], 1)


def rotation_at(t, x1):
    c, s = math.cos(2 * t - 2), math.sin(2 * t - 2)
    return torch.stack([c * x1[:, 0] - s * x1[:, 1], s * x1[:, 0] + c * x1[:, 1]], 1)


FIELDS = {"linear": (linear, linear_at), "rotation": (rotation, rotation_at)}
every_field = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)


def start(dtype=torch.float64):
    return torch.linspace(-1, 1, 10, dtype=dtype).view(1, 2, 5)


def uneven(steps):
    """Falling times from 1 to 0 whose steps differ up to threefold."""
    return [(1 - i / steps) * (1 + 0.5 * i / steps) for i in range(steps + 1)]


def by_runge_kutta(update, velocity, x, times, tableau):
    for t, t_next in pairwise(times):
        stage, past = x, []
        for step in runge_kutta(tableau, t_next - t):
            v = velocity(stage, t + step.at * (t_next - t))
            stage, _, v = update([x], step.a, v, b=step.b, past=past, past_b=step.past_b, return_velocity=True)
            past.append(v)
        x = stage
    return x


def by_adams_bashforth(update, velocity, x, times, order, solution):
    """Its first velocities come from the exact solution, so the error is the method's own."""
    past = [velocity(solution(t), t) for t in times[: order - 1]]
    x = solution(times[order - 1])
    for n in range(order - 1, len(times) - 1):
        step = adams_bashforth(times[n - order + 1 : n + 2])
        v = velocity(x, times[n])
        x, _, v = update([x], step.a, v, b=step.b, past=past, past_b=step.past_b, return_velocity=True)
        past = [*past, v][-(order - 1) :] if order > 1 else []
    return x


def by_dpm2m(update, velocity, x, times):
    states, past, last = [x], [], None
    for t, t_next in pairwise(times):
        step = dpm2m(t, t_next, last)
        v = velocity(states[0], t)
        x, _, v = update(states, step.a, v, b=step.b, past=past, past_b=step.past_b, return_velocity=True)
        states, past, last = [x, states[0]], [v], t
    return x


def order_of(solve, solution, steps):
    """log2 of how the error falls when the steps halve."""
    coarse, fine = ((solve(uneven(n)) - solution(0)).abs().max() for n in (steps, 2 * steps))
    return math.log2(coarse / fine)


@every_field
@pytest.mark.parametrize(("tableau", "order"), TABLEAUS.values(), ids=TABLEAUS)
def test_runge_kutta_converges_with_its_order(field, tableau, order):
    def solve(times):
        return by_runge_kutta(flexkernels.flow_update_ref, field[0], start(), times, tableau)

    assert order - 0.2 < order_of(solve, lambda t: field[1](t, start()), 40) < order + 0.5


@every_field
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_converges_with_its_order(field, order):
    def solution(t):
        return field[1](t, start())

    def solve(times):
        return by_adams_bashforth(flexkernels.flow_update_ref, field[0], start(), times, order, solution)

    assert order - 0.2 < order_of(solve, solution, 80) < order + 0.5


@every_field
def test_dpm2m_converges_with_order_two(field):
    """Between the ends; over the whole of [0, 1], where lambda is infinite, second order up to a logarithm."""

    def error(times):
        x = field[1](times[0], start())
        return (by_dpm2m(flexkernels.flow_update_ref, field[0], x, times) - field[1](times[-1], start())).abs().max()

    inner, whole = [], []
    for steps in (160, 320):
        inner.append(error([0.05 + 0.9 * t for t in uneven(steps)]))
        whole.append(error(uneven(steps)))
    assert 1.8 < math.log2(inner[0] / inner[1]) < 2.2
    assert 1.4 < math.log2(whole[0] / whole[1]) < 2.2


def test_dpm2m_is_exact_for_a_single_clean_sample():
    clean, noise = torch.randn(2, 1, 2, 5, dtype=torch.float64)
    result = by_dpm2m(flexkernels.flow_update_ref, lambda x, t: (x - clean) / t, noise, uneven(4))
    torch.testing.assert_close(result, clean, rtol=0, atol=1e-13)


def test_dpm2m_is_the_published_update():
    """arXiv 2211.01095, algorithm 2, line by line with alpha = 1 - t, sigma = t."""
    x_last, v_last, x, v = torch.randn(4, 1, 2, 5, dtype=torch.float64)
    s, t, t_next = 0.9, 0.7, 0.4
    h_last, h = (math.log((1 - b) / b) - math.log((1 - a) / a) for a, b in ((s, t), (t, t_next)))
    r = h_last / h
    data = (1 + 1 / (2 * r)) * (x - t * v) - 1 / (2 * r) * (x_last - s * v_last)
    expected = t_next / t * x - (1 - t_next) * (math.exp(-h) - 1) * data
    step = dpm2m(t, t_next, s)
    result, _ = flexkernels.flow_update_ref([x, x_last], step.a, v, b=step.b, past=[v_last], past_b=step.past_b)
    torch.testing.assert_close(result, expected)


def test_dpm2m_is_euler_at_both_ends():
    for step in (dpm2m(1.0, 0.8), dpm2m(0.8, 0.5, 1.0), dpm2m(0.2, 0.0, 0.3)):
        assert step.a[0] == pytest.approx(1) and not any(step.a[1:]) and not any(step.past_b)
    assert [dpm2m(*times).b for times in ((1.0, 0.8), (0.8, 0.5, 1.0), (0.2, 0.0, 0.3))] == pytest.approx(
        [-0.2, -0.3, -0.2]
    )


def test_adams_bashforth_on_even_steps_is_the_textbook():
    rows = {2: (-1 / 2, 3 / 2), 3: (5 / 12, -16 / 12, 23 / 12), 4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24)}
    for order, row in rows.items():
        step = adams_bashforth([1 - 0.1 * i for i in range(order + 1)])
        assert (*step.past_b, step.b) == pytest.approx([-0.1 * weight for weight in row])


@on_every_backend
@pytest.mark.parametrize("solver", ["rk4", "ab3", "dpm2m"])
def test_solvers_run_on_every_backend(place, solver):
    """float32 kernels end where the float64 reference ends, guided by CFG from two halves of the field."""
    field, solution = FIELDS["rotation"]

    def run(update, x):
        def guided(states, a, v, **settings):
            return update(states, a, v, 0.5 * v, guidance=CFG(1.5), **settings)

        def velocity(x, t):
            return 0.8 * field(x, t)

        if solver == "rk4":
            return by_runge_kutta(guided, velocity, x, uneven(6), RK4)
        if solver == "ab3":
            exact = lambda t: solution(t, start()).to(x.dtype).to(x.device)  # noqa: E731
            return by_adams_bashforth(guided, velocity, x, uneven(6), 3, exact)
        return by_dpm2m(guided, velocity, x, uneven(6))

    with flexkernels.backend(place[0]):
        result = run(flexkernels.flow_update, start(torch.float32).to(place[1])).cpu()
    torch.testing.assert_close(result.double(), run(flexkernels.flow_update_ref, start()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adams_bashforth([0.1]), "times must hold 2 to 5 times, got 1"),
        (lambda: adams_bashforth([1.0, 0.5, 0.5]), "times must be strictly monotonic"),
        (lambda: adams_bashforth([1.0, 0.5, math.nan]), "times must be finite"),
        (lambda: dpm2m(0.5, 0.5), "t must lie above t_next, 0.5, and not above 1, got 0.5"),
        (lambda: dpm2m(1.5, 0.5), "t must lie above t_next, 0.5, and not above 1, got 1.5"),
        (lambda: dpm2m(0.5, -0.1), "t_next must be at least 0, got -0.1"),
        (lambda: dpm2m(0.5, 0.1, 0.4), "t_last must lie above t, 0.5, and not above 1, got 0.4"),
        (lambda: runge_kutta(RK4, math.inf), "dt must be finite"),
    ],
)
def test_wrong_times_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

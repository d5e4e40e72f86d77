"""Schedules, solvers and guidance over time, on velocity fields with known solutions."""

import math

import pytest
import torch

import vft
from vft.solver import SOLVERS, evaluations, interval, resolve, sample, schedule

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2, "ab3": 3, "dpm2m": 2}


def integrate(field, x, solver, times, **options):
    """`field(x, t)` is the velocity; x a list."""
    plan = evaluations(solver, times)
    return sample(lambda x, i, guided: ([field(z, plan[i].t) for z in x], None), x, plan, **options)


def test_schedules():
    assert schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule(2, shift=3.0) == [1.0, 0.75, 0.0]
    assert schedule([1, 0.3, 0]) == [1.0, 0.3, 0.0]
    for wrong in (0, -1, True, [1.0], [1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.4, 0.0]):
        with pytest.raises(ValueError, match="steps must be"):
            schedule(wrong)
    for wrong in (0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(ValueError, match="shift must be a positive number"):
            schedule(4, wrong)


def test_unknown_solver():
    with pytest.raises(
        ValueError, match="solver must be one of euler, midpoint, heun, rk4, ab2, ab3, dpm2m, got 'rk5'"
    ):
        evaluations("rk5", schedule(4))


@pytest.mark.parametrize("solver", SOLVERS)
def test_number_of_evaluations_and_progress(solver):
    steps, seen = [], []
    plan = evaluations(solver, schedule(5))
    assert len(plan) == 5 * SOLVERS[solver] + (solver == "ab3")
    sample(lambda x, i, guided: (seen.append(i) or x, None), [torch.ones(1, 1, 2, 2)], plan, progress=steps.append)
    assert steps == [1, 2, 3, 4, 5] and seen == list(range(len(plan)))


def test_euler_on_a_linear_field():
    """dx/dt = x from t = 1 to 0: (1 - 1/n)^n of the start."""
    x = torch.randn(2, 1, 3, 3)
    got = integrate(lambda x, t: x, [x], "euler", schedule(10))
    torch.testing.assert_close(got[0], x * 0.9**10)


def swirl(x, t):
    # two channels that turn into each other, faster with time: the solution is a rotation by t + t^2
    return torch.stack([-x[1], x[0]]) * (1 + 2 * t)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence(solver, shift):
    """The error falls with the order of the method; shifted schedules have steps of unequal length."""
    x = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    angle = -2.0
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    exact = (turn @ x.view(2)).double()
    coarse, fine = (8, 16) if ORDERS[solver] == 4 else (24, 48)
    errors = [
        float((integrate(swirl, [x], solver, schedule(n, shift))[0].view(2).double() - exact).norm())
        for n in (coarse, fine)
    ]
    order = math.log2(errors[0] / errors[1])
    assert ORDERS[solver] - 0.45 < order < ORDERS[solver] + 1.6, (order, errors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_straight_flow_is_exact(solver):
    """The velocity noise - clean leads to the clean point in any number of steps."""
    clean, noise = torch.randn(2, 2, 1, 3, 3)
    got = integrate(lambda x, t: noise - clean, [noise], solver, schedule(3, 1.5))
    torch.testing.assert_close(got[0], clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ragged_samples_are_integrated_alone(solver):
    xs = [torch.randn(2, 1, 3, 3), torch.randn(2, 4, 2, 5), torch.randn(2, 1, 1, 1)]
    together = integrate(swirl, xs, solver, schedule(6))
    for x, got in zip(xs, together, strict=True):
        torch.testing.assert_close(got, integrate(swirl, [x], solver, schedule(6))[0], rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_clean_prefix_is_there_at_every_evaluation(solver):
    x, prefix = torch.randn(2, 3, 2, 2), torch.randn(2, 1, 2, 2)
    plan = evaluations(solver, schedule(4))

    def velocity(x, i, guided):
        assert torch.equal(x[0][:, :1], prefix)
        return [torch.ones_like(x[0])], None

    got = sample(velocity, [x], plan, prefix=[prefix])
    assert torch.equal(got[0][:, :1], prefix)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "ab2"])
def test_noised_prefix_has_the_time_of_its_evaluation(solver):
    x, prefix = torch.randn(2, 3, 2, 2), torch.randn(2, 1, 2, 2)
    plan = evaluations(solver, schedule(4))

    def velocity(states, i, guided):
        t = plan[i].t
        want = (1 - t) * prefix + t * x[:, :1]
        torch.testing.assert_close(states[0][:, :1], want, rtol=1e-5, atol=1e-6)
        return [torch.ones_like(states[0])], None

    sample(velocity, [x], plan, prefix=[prefix], prefix_mode="sdedit")


@pytest.mark.parametrize("every", [1, 2, 3])
def test_unconditional_velocity_of_every_nth_evaluation(every):
    """Against the sum by hand; what a velocity returns is overwritten by the next one, as a CUDA graph does."""
    times, asked, out = schedule(6), [], [torch.empty(1, 1, 2, 2), torch.empty(1, 1, 2, 2)]

    def velocity(x, i, guided):
        asked.append(guided)
        out[0].copy_(x[0] + i)
        out[1].copy_(2 * x[0] - i if guided else torch.full_like(x[0], math.nan))
        return [out[0]], [out[1]] if guided else None

    noise = torch.randn(1, 1, 2, 2)
    # guidance is off in the first of the six
    scale = interval(3.0, 0.0, 0.9)
    got = sample(velocity, [noise], evaluations("euler", times), guidance=vft.CFG(scale), null_every=every)
    x = noise
    for i in range(6):
        conditional = x + i
        if i and (i - 1) % every == 0:
            difference = conditional - (2 * x - i)
        v = conditional + 2 * difference if i else conditional
        x = x + (times[i + 1] - times[i]) * v
    torch.testing.assert_close(got[0], x)
    assert asked == [i > 0 and (i - 1) % every == 0 for i in range(6)]
    with pytest.raises(ValueError, match="null_every must be at least 1, got 0"):
        sample(velocity, [noise], [], null_every=0)


def test_guidance_over_time():
    assert resolve(None, 0.5) is None
    assert resolve(vft.CFG(1.0), 0.5) is None
    assert resolve(vft.CFG(lambda t: 1 + t), 0.5) == vft.CFG(1.5)
    calls = []
    plan = evaluations("euler", schedule(4))

    def velocity(x, i, guided):
        calls.append((plan[i].t, guided))
        return x, x if guided else None

    sample(velocity, [torch.ones(1, 1, 2, 2)], plan, guidance=vft.CFG(interval(3.0, 0.6, 1.0)))
    assert calls == [(1.0, True), (0.75, True), (0.5, False), (0.25, False)]
    with pytest.raises(ValueError, match="low and high must satisfy"):
        interval(3.0, 0.6, 0.2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_is_part_of_every_evaluation(solver):
    """CFG of two linear fields is a linear field."""
    x = torch.randn(2, 1, 3, 3)
    plan = evaluations(solver, schedule(5))
    guided = sample(lambda x, i, _: ([0.5 * z for z in x], [0.3 * z for z in x]), [x], plan, guidance=vft.CFG(3.0))
    plain = integrate(lambda x, t: 0.9 * x, [x], solver, schedule(5))
    torch.testing.assert_close(guided[0], plain[0], rtol=1e-5, atol=1e-6)

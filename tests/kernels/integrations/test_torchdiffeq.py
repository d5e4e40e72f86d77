import warnings

import pytest
import torch
from helpers import called_ops
from torch import nn

from flexkernels.integrations.torchdiffeq import odeint

torchdiffeq = pytest.importorskip("torchdiffeq")

METHODS = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAMS = [("explicit_adams", dict(max_order=order)) for order in (4, 5)]
EVERY = [(method, None) for method in METHODS] + ADAMS


class Field(nn.Module):
    """A velocity that depends on the time, on a parameter and on the whole last axis."""

    def __init__(self, width=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)
        self.times = []

    def forward(self, t, y):
        assert t.dim() == 0 and t.dtype == y.dtype
        self.times.append(float(t))
        return torch.sin(y @ self.weight) * (1 + t) + torch.cos(3 * t)


def both(field, *args, **settings):
    return [solve(field, *args, **settings) for solve in (odeint, torchdiffeq.odeint)]


@pytest.mark.parametrize("method, options", EVERY, ids=str)
@pytest.mark.parametrize(
    "times", [[0.0, 0.1, 0.35, 0.4, 0.7, 0.8, 1.0], [1.0, 0.8, 0.5, 0.45, 0.2, -0.1], [0.3]], ids=str
)
def test_same_solution(method, options, times):
    field, y0, t = Field(), torch.randn(3, 7, 5), torch.tensor(times, dtype=torch.float64)
    got, expected = both(field, y0, t, method=method, options=options)
    assert got.dtype == expected.dtype and got.shape == (len(times), 3, 7, 5)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    calls = len(field.times) // 2
    assert field.times[:calls] == pytest.approx(field.times[calls:], abs=1e-6)


@pytest.mark.parametrize("method, options", EVERY, ids=str)
def test_gradients(method, options):
    field, y0, t = Field(), torch.randn(4, 5, requires_grad=True), torch.linspace(0, 1, 6)
    got, expected = (
        torch.autograd.grad(y.square().sum(), (y0, field.weight))
        for y in both(field, y0, t, method=method, options=options)
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_really_runs_the_kernel(monkeypatch):
    calls = called_ops(monkeypatch)
    odeint(Field(), torch.randn(2, 5), torch.linspace(0, 1, 3), method="rk4")
    assert calls == ["flow_update"] * 8


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (0, 5)], ids=str)
def test_any_shape(shape):
    field = Field() if shape else lambda t, y: torch.cos(t) * y
    got, expected = both(field, torch.randn(shape), torch.linspace(1, 0, 4), method="rk4")
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]], ids=str)
@pytest.mark.parametrize("method, options", [("heun3", None), ADAMS[1]], ids=str)
def test_tuples(times, method, options):
    def field(t, y):
        position, velocity = y
        return velocity, -position * t

    y0, t = (torch.randn(4, 3), torch.randn(4, 3)), torch.linspace(*times, 9)
    got, expected = both(field, y0, t, method=method, options=options)
    assert isinstance(got, tuple)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("times", [[0.0, 0.31, 0.5, 1.0], [1.0, 0.4, 0.33]], ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(step_size=0.13), dict(grid_constructor=lambda func, y0, t: torch.linspace(float(t[0]), float(t[-1]), 8))],
)
def test_a_grid_of_its_own(times, options):
    got, expected = both(Field(), torch.randn(2, 5), torch.tensor(times), method="midpoint", options=options)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_further_from_the_truth(dtype):
    y0, t = torch.randn(64, 5).to(dtype), torch.linspace(0, 1, 5)
    field = lambda t, y: torch.sin(3 * y) * (1 + t)  # noqa: E731
    got, theirs = both(field, y0, t, method="rk4")
    exact = torchdiffeq.odeint(field, y0.double(), t.double(), method="rk4")
    assert got.dtype == dtype
    assert (got.double() - exact).abs().mean() <= 1.2 * (theirs.double() - exact).abs().mean()


def test_callbacks():
    class Told(Field):
        def callback_step(self, t0, y0, dt):
            self.seen.append((float(t0), y0.clone(), float(dt)))

    for times in ([0.0, 0.2, 0.5], [0.5, 0.2, 0.0]):
        field = Told()
        seen = []
        for solve in (odeint, torchdiffeq.odeint):
            field.seen = []
            solve(field, torch.ones(2, 5), torch.tensor(times), method="euler")
            seen.append(field.seen)
        for (t, y, dt), (t_theirs, y_theirs, dt_theirs) in zip(*seen, strict=True):
            assert (t, dt) == pytest.approx((t_theirs, dt_theirs))
            torch.testing.assert_close(y, y_theirs)


def rising(t, y):
    return torch.cos(t) * y


class Accepting(Field):
    def callback_accept_step(self, t0, y0, dt):
        raise AssertionError("no solver of fixed steps accepts a step")


HANDED_ON = [
    dict(method=None),
    dict(method="dopri5"),
    dict(method="implicit_adams"),
    dict(method="explicit_adams"),
    dict(options=dict(interp="cubic", step_size=0.07)),
    dict(options=dict(perturb=True)),
    dict(y0=torch.ones(2, dtype=torch.float64)),
    dict(y0=(torch.ones(2), torch.ones(1, dtype=torch.float64))),
    dict(event_fn=lambda t, y: y.sum() - 2.5, t=torch.tensor([0.0, 1.0]), options=dict(step_size=0.1)),
    dict(options=dict(steps=4)),
    dict(options=dict(max_order=4)),
    dict(func=Accepting(2)),
]


@pytest.mark.parametrize("change", HANDED_ON, ids=lambda change: "-".join(change))
def test_the_rest_is_torchdiffeqs_own(change, monkeypatch):
    calls = called_ops(monkeypatch)
    settings = dict(func=rising, y0=torch.ones(2), t=torch.linspace(0, 1, 3), method="rk4") | change
    if isinstance(settings["y0"], tuple):
        settings["func"] = lambda t, y: tuple(torch.cos(t) * each for each in y)
    results, warned = [], []
    for solve in (odeint, torchdiffeq.odeint):
        func, y0, t = (settings[name] for name in ("func", "y0", "t"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(solve(func, y0, t, **{k: v for k, v in settings.items() if k not in ("func", "y0", "t")}))
        warned.append([str(warning.message) for warning in caught])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert warned[0] == warned[1] and calls == []


def test_a_gradient_to_the_times():
    gradients = []
    for solve in (odeint, torchdiffeq.odeint):
        t = torch.linspace(0, 1, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(solve(rising, torch.ones(3), t, method="rk4").sum(), t)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        dict(t=torch.tensor([0.0, 1.0, 1.0])),
        dict(t=torch.tensor([0, 1])),
        dict(t=[0.0, 1.0]),
        dict(y0=[torch.ones(2)]),
        dict(method="euler2"),
        dict(options=dict(step_size=0.1, grid_constructor=lambda func, y0, t: t)),
    ],
    ids=lambda change: "-".join(change),
)
def test_what_is_malformed_gets_torchdiffeqs_error(change):
    settings = dict(y0=torch.ones(2), t=torch.linspace(0, 1, 3), method="rk4") | change
    errors = []
    for solve in (odeint, torchdiffeq.odeint):
        with pytest.raises(Exception) as raised:
            solve(rising, settings["y0"], settings["t"], method=settings["method"], options=settings.get("options"))
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(func=lambda t, y: y[:1]), r"func must give the shape \[2\] of the state, got \[1\]"),
        (
            dict(options=dict(grid_constructor=lambda func, y0, t: t[:-1])),
            "grid_constructor must give a grid from the first to the last of t",
        ),
    ],
)
def test_errors(change, message):
    settings = dict(func=rising, y0=torch.zeros(2), t=torch.linspace(0, 1, 3), method="rk4") | change
    with pytest.raises(ValueError, match=message):
        odeint(settings.pop("func"), settings.pop("y0"), settings.pop("t"), **settings)

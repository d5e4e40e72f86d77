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


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(method=None), ValueError, "method must be one of euler, .*, explicit_adams, got None"),
        (dict(method="dopri5"), ValueError, "method must be one of"),
        (dict(method="explicit_adams"), ValueError, "max_order must be 4 or 5 for explicit_adams, got None"),
        (dict(options=dict(max_order=4)), ValueError, "max_order must be given for explicit_adams alone, got 4"),
        (dict(options=dict(steps=4)), ValueError, "options must be among step_size, grid_constructor, .*, got steps"),
        (dict(options=dict(interp="cubic")), ValueError, "interp must be linear, got 'cubic'"),
        (dict(options=dict(perturb=True)), ValueError, "perturb must be False"),
        (dict(event_fn=lambda t, y: y), ValueError, "event_fn must be None"),
        (dict(y0=torch.zeros(2, dtype=torch.float64)), TypeError, "y0 must be float32 or .*, got float64"),
        (dict(t=torch.tensor([0.0, 1.0, 1.0])), ValueError, "t must rise or fall strictly"),
        (dict(t=torch.zeros(0)), ValueError, "t must have at least one time"),
        (dict(t=torch.linspace(0, 1, 3, requires_grad=True)), ValueError, "t must need no gradient"),
        (dict(func=lambda t, y: y[:1]), ValueError, r"func must give the shape \[2\] of the state, got \[1\]"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    settings = dict(func=lambda t, y: y, y0=torch.zeros(2), t=torch.linspace(0, 1, 3), method="rk4") | change
    func, y0, t = (settings.pop(name) for name in ("func", "y0", "t"))
    with pytest.raises(error, match=message):
        odeint(func, y0, t, **settings)

"""causal_conv and norm_silu against float64, on every ISA level; wrong input; tracing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, assert_accurate, interpreted, on_every_backend, repeat_at_level
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import _native

pytestmark = pytest.mark.usefixtures("without_gradient")
op = torch.ops.flexkernels
# its kernels
norm_silu_places = pytest.mark.parametrize(
    "place", [p for p in on_every_backend.args[1] if p.values[0][0] in ("cpu", "triton")]
)
# channels, outputs, frames, height, width, taps, options
CASES = {
    "space": (8, 8, 5, 6, 10, (1, 3, 3), {}),
    "space odd": (13, 20, 2, 1, 7, (1, 3, 3), {}),
    "space and time": (16, 33, 4, 9, 5, (3, 3, 3), {}),
    "few channels": (3, 16, 5, 8, 8, (3, 3, 3), {}),
    "time": (16, 20, 7, 3, 2, (3, 1, 1), {}),
    "time of one frame": (17, 16, 1, 3, 2, (3, 1, 1), {}),
    "pixel": (16, 3, 2, 5, 3, (1, 1, 1), {}),
    "stride": (9, 16, 2, 8, 6, (1, 3, 3), {"stride": 2}),
    "time stride": (16, 16, 4, 5, 6, (3, 3, 3), {"time_stride": 2}),
    "upsample": (12, 18, 2, 5, 7, (1, 3, 3), {"upsample": True}),
    "phases": (12, 40, 3, 5, 7, (2, 3, 3), {"phases": 2}),
    "many tiles": (8, 16, 9, 33, 31, (1, 3, 3), {}),
}


@pytest.fixture
def without_gradient():
    with torch.no_grad():
        yield


def draw(name, batch=2):
    channels, outputs, frames, height, width, taps, options = CASES[name]
    x = torch.randn(batch, frames, height, width, channels)
    weight = torch.randn(outputs, channels, *taps) / (channels * taps[0] * taps[1] * taps[2]) ** 0.5
    past = torch.randn(batch, taps[0] - options.get("time_stride", 1), height, width, channels)
    return x, weight, torch.randn(outputs), past, options


def formula(x, weight, bias, past, *, time_stride=1, stride=1, phases=1, upsample=False):
    """In x's dtype, from the weights as they were given."""
    x = torch.cat([past, x], 1).permute(0, 4, 1, 2, 3)
    if upsample:
        x = F.interpolate(x, scale_factor=(1, 2, 2))
    high, wide = weight.shape[3] - 1, weight.shape[4] - 1
    x = F.pad(x, (0, wide, 0, high) if stride > 1 else (wide // 2, wide // 2, high // 2, high // 2))
    y = F.conv3d(x, weight, bias, (time_stride, stride, stride)).unflatten(1, (phases, -1))
    return y.permute(0, 3, 1, 4, 5, 2).flatten(1, 2)


def error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, backend):
    x, weight, bias, past, options = draw(name)
    exact = formula(*(t.double() for t in (x, weight, bias, past)), **options)
    residual = torch.randn(exact.shape)
    prepared = flexkernels.prepare_conv(weight, bias, **options)
    with flexkernels.backend(backend):
        y = flexkernels.causal_conv(x, prepared, residual=residual, past=past)
        zeros = flexkernels.causal_conv(x, prepared)
    # transformed tiles cost a few times the rounding of a plain sum
    assert error(y, exact + residual) < 1e-6
    assert error(zeros, formula(*(t.double() for t in (x, weight, bias, 0 * past)), **options)) < 1e-6


@pytest.mark.parametrize("name", ["space", "time", "phases", "time stride"])
def test_a_clip_in_pieces_is_the_clip(name):
    """With the frames before as `past`; and a sample is itself among others."""
    x, weight, bias, past, options = draw(name)
    step = 2 * options.get("time_stride", 1)
    prepared = flexkernels.prepare_conv(weight, bias, **options)
    whole = flexkernels.causal_conv(x, prepared, past=past)
    pieces, seen = [], past
    for part in x.split(step, 1):
        pieces.append(flexkernels.causal_conv(part, prepared, past=seen))
        seen = torch.cat([seen, part], 1)[:, -past.shape[1] :] if past.shape[1] else past
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
    if _native.C is not None:
        # convolutions of PyTorch may sum a batch in another order
        assert torch.equal(flexkernels.causal_conv(x[:1], prepared, past=past[:1]), whole[:1])


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_at_lower_isa_levels(level):
    repeat_at_level(__file__, "against_float64 and auto or norm_silu_against", level)


def test_weights_that_err_are_seen():
    x, weight, bias, past, options = draw("space")
    prepared = flexkernels.prepare_conv(weight, bias, **options)
    wrong = replace(prepared, weight=prepared.weight.roll(1, 1))
    exact = formula(*(t.double() for t in (x, weight, bias, past)), **options)
    assert error(flexkernels.causal_conv(x, wrong, past=past), exact) > 0.1


def test_empty():
    x, weight, bias, _, _ = draw("space", batch=0)
    assert flexkernels.causal_conv(x, flexkernels.prepare_conv(weight, bias)).shape == (0, 5, 6, 10, 8)
    assert flexkernels.norm_silu(torch.zeros(0, 4), torch.ones(4), torch.ones(4)).shape == (0, 4)


def norm_silu(place, *arguments):
    with flexkernels.backend(place[0]):
        return flexkernels.norm_silu(*(x.to(place[1]) for x in arguments)).cpu()


@norm_silu_places
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 8, 13, 128, 151, 2100])
def test_norm_silu_against_float64(place, width, dtype):
    x = (3 * torch.randn(7, 3, width) + 1).to(dtype)
    weight, bias = torch.randn(2, width)
    plain = F.silu(F.layer_norm(x, (width,), weight.to(dtype), bias.to(dtype), 1e-6))
    exact = flexkernels.norm_silu_ref(x.double(), weight.double(), bias.double())
    result = norm_silu(place, x, weight, bias)
    if interpreted(place) and dtype == torch.bfloat16:
        # the interpreter cuts bfloat16 off instead of rounding
        torch.testing.assert_close(result.double(), exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max()))
    else:
        assert_accurate(result, plain, exact)


@norm_silu_places
def test_rows_of_norm_silu_depend_on_themselves(place):
    """Views, neighbours that are NaN, and the place of a row change nothing."""
    x, (weight, bias) = torch.randn(9, 33), torch.randn(2, 33)
    whole = norm_silu(place, x, weight, bias)
    assert torch.equal(norm_silu(place, x.T.contiguous().T, weight, bias), whole)
    assert torch.equal(norm_silu(place, x[3:4], weight, bias), whole[3:4])
    beside = x.clone()
    beside[4, 5] = torch.nan
    poisoned = norm_silu(place, beside, weight, bias)
    others = torch.arange(9) != 4
    assert poisoned[4].isnan().all() and torch.equal(poisoned[others], whole[others])
    assert norm_silu(place, x[:0], weight, bias).shape == (0, 33)


def test_opcheck():
    x, weight, bias, past, _ = draw("space and time", batch=1)
    p = flexkernels.prepare_conv(weight, bias)
    numbers = p.kind, list(p.taps), p.time_stride, p.stride, p.phases, p.outputs
    torch.library.opcheck(op.causal_conv.default, (x, p.weight, p.bias, None, past, *numbers))
    torch.library.opcheck(op.norm_silu.default, (torch.randn(3, 8), torch.randn(8), torch.randn(8), 1e-6))


def test_compiles_to_one_graph():
    x, weight, bias, _, _ = draw("upsample")
    prepared = flexkernels.prepare_conv(weight, bias, upsample=True)
    compiled = torch.compile(lambda x: flexkernels.causal_conv(x, prepared), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), flexkernels.causal_conv(x, prepared))


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        x, weight = torch.empty(1, 4, 6, 8, 9), torch.empty(10, 9, 2, 3, 3)
        assert flexkernels.causal_conv(x, flexkernels.prepare_conv(weight, phases=2)).shape == (1, 8, 6, 8, 5)


X, WEIGHT = torch.zeros(1, 4, 6, 6, 8), torch.zeros(5, 8, 3, 3, 3)
WRONG = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.half()}, TypeError, "x must be float32.*, got float16"),
    ({"x": X[0]}, ValueError, "x must have 5 dimensions"),
    ({"x": X[..., :7]}, ValueError, r"weight must have the shape \[1, 36, 21, 16\], got \[1, 36, 24, 16\]"),
    ({"residual": X}, ValueError, r"residual must have the shape \[1, 4, 6, 6, 5\]"),
    ({"past": X[:, :1]}, ValueError, r"past must have the shape \[1, 2, 6, 6, 8\]"),
    ({"past": X[:, :2].to("meta")}, ValueError, "past must be on cpu like x, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    for function in (flexkernels.causal_conv, flexkernels.causal_conv_ref):
        with pytest.raises(error, match=message):
            function(**{"x": X, "weight": flexkernels.prepare_conv(WEIGHT)} | change)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32"),
        ({"weight": WEIGHT[..., 0]}, ValueError, "weight must have 5 dimensions"),
        ({"phases": 2}, ValueError, "weight must have a positive multiple of 2 outputs"),
        ({"time_stride": 4}, ValueError, "time_stride must be at most 3, the taps in time, got 4"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have the shape \[5\], got \[4\]"),
        ({"weight": WEIGHT[..., :1], "upsample": True}, ValueError, "upsample must come with taps 3 x 3"),
    ],
)
def test_wrong_weights_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        flexkernels.prepare_conv(**{"weight": WEIGHT} | given)


def test_a_stride_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="x must have frames and sides that are multiples of 1 and 2"):
        flexkernels.causal_conv(X[:, :, :5], flexkernels.prepare_conv(WEIGHT[:, :, :1], stride=2))


def test_norm_silu_refuses():
    one = torch.ones(4)
    for given, error_type, message in [
        ((torch.ones(4).int(), one, one), TypeError, "x must be float32"),
        ((torch.ones(()), one, one), ValueError, "x must have at least 1 dimension"),
        ((one, torch.ones(3), one), ValueError, r"weight must have the shape \[4\], got \[3\]"),
        ((one, one, one.half()), TypeError, "bias must be float32, got float16"),
    ]:
        with pytest.raises(error_type, match=message):
            flexkernels.norm_silu(*given)
    with pytest.raises(ValueError, match="eps must be finite and at least 0, got -1"):
        flexkernels.norm_silu(one, one, one, eps=-1.0)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="norm_silu has no gradient"):
        flexkernels.norm_silu(one.requires_grad_(), one, one)

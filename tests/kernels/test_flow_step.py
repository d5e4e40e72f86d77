import dataclasses
import math

import pytest
import torch
from flow_cases import (
    GUIDANCE,
    convert,
    draw,
    draw_ragged,
    every_guidance,
    gradients,
    tensors_of,
    with_tensors,
)
from helpers import DEVICE, FLOATS, assert_accurate, inductor, interpreted, needs_gpu, on_every_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import APG, CFG, Prefix

op = torch.ops.flexkernels


def step(place, arguments):
    with flexkernels.backend(place[0]):
        results = flexkernels.flow_step(**convert(arguments, place[1]))
    return [None if result is None else result.cpu() for result in results]


def check(place, arguments):
    """flow_step of one backend against the float64 formula and its same-dtype rounding."""
    results = step(place, arguments)
    formula = flexkernels.flow_step_ref(**arguments)
    exact = flexkernels.flow_step_ref(**convert(arguments, double=True))
    assert (results[1] is None) == (exact[1] is None)
    for result, plain, true in zip(results, formula, exact, strict=True):
        if true is not None and not (interpreted(place) and result.dtype == torch.bfloat16):
            assert_accurate(result, plain, true)
        elif true is not None:
            # the interpreter cuts bfloat16 off instead of rounding
            torch.testing.assert_close(result.double(), true, rtol=2**-7, atol=1e-6)
    return results


def published_apg(x, v_cond, v_uncond, dt, guidance):
    """Algorithm 1 of arXiv 2410.02416 for one row, number by number."""
    d = [c - u for c, u in zip(v_cond, v_uncond, strict=True)]
    norm = math.sqrt(sum(value * value for value in d))
    if guidance.threshold > 0:
        d = [value * min(1.0, guidance.threshold / norm) for value in d]
    length = math.sqrt(sum(value * value for value in v_cond))
    unit = [value / length for value in v_cond]
    dot = sum(a * b for a, b in zip(d, unit, strict=True))
    result = []
    for position, direction, c, e in zip(x, d, v_cond, unit, strict=True):
        parallel = dot * e
        update = (direction - parallel) + guidance.eta * parallel
        result.append(position + dt * (c + (guidance.scale - 1) * update))
    return result


def test_reference_is_the_published_algorithm():
    guidance = APG(7.0, threshold=1.0, eta=0.3)
    arguments = convert(draw(guidance, (2, 3, 4, 5)), double=True)
    result, _ = flexkernels.flow_step_ref(**arguments)
    rows = (arguments[name].flatten(2).flatten(0, 1).tolist() for name in ("x", "v_cond", "v_uncond"))
    expected = [published_apg(*row, -0.05, guidance) for row in zip(*rows, strict=True)]
    torch.testing.assert_close(result.view(6, 20), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@on_every_backend
@every_guidance
@pytest.mark.parametrize("v_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_accuracy(place, guidance, x_dtype, v_dtype):
    check(place, draw(guidance, (2, 3, 5, 7, 9), x_dtype, v_dtype, prefix=(2, 3, 1, 7, 9)))


@on_every_backend
@every_guidance
@pytest.mark.parametrize("length", [1, 17, 129, 151, 1025, 2500])
def test_odd_lengths(place, guidance, length):
    check(place, draw(guidance, (1, 3, length)))


@on_every_backend
@every_guidance
def test_ragged_rows(place, guidance):
    arguments = draw_ragged(guidance)
    results = check(place, arguments)
    # each row by itself gives the same numbers
    prefix = arguments["prefix"]
    starts, prefixes = arguments["row_offsets"].tolist(), prefix.offsets.tolist()
    for r in (0, 1, 3, 5):
        cut = {"row_offsets": None}
        for name in ("x", "v_cond", "v_uncond", "momentum_buffer"):
            if name in arguments:
                cut[name] = arguments[name][starts[r] : starts[r + 1]].view(1, 1, -1)
        values, noise = (t[prefixes[r] : prefixes[r + 1]].view(1, 1, -1) for t in (prefix.values, prefix.noise))
        cut["prefix"] = Prefix(values, noise=noise, time=prefix.time)
        alone = step(place, arguments | cut)
        packed = results[0][starts[r] : starts[r + 1]]
        if place[0] == "reference":
            torch.testing.assert_close(alone[0].view(-1), packed)
        else:
            assert torch.equal(alone[0].view(-1), packed)


@on_every_backend
@every_guidance
def test_rows_of_several_blocks(place, guidance):
    """A prefix that ends inside a pack and a block of its row, beside a row shorter than a pack and one without any."""
    prefix = Prefix(torch.randn(1504), torch.tensor([0, 1502, 1504, 1504]), torch.randn(1504), 0.3)
    offsets = torch.tensor([0, 4104, 4107, 9000])
    check(place, draw(guidance, 9000, row_offsets=offsets) | {"prefix": prefix})


@on_every_backend
def test_momentum_starts_from_zeros_and_runs_on(place):
    guidance = APG(5.0, threshold=0.6, momentum=-0.75)
    arguments = draw(guidance, (2, 2, 33), momentum_buffer=torch.zeros(2, 2, 33))
    x_next, buffer = check(place, arguments)
    torch.testing.assert_close(buffer, arguments["v_cond"] - arguments["v_uncond"], rtol=0, atol=0)
    _, second = check(place, arguments | {"x": x_next, "momentum_buffer": buffer})
    torch.testing.assert_close(second, 0.25 * buffer)


@on_every_backend
@every_guidance
def test_rows_of_whole_samples_guide_per_sample(place, guidance):
    """[B, C, n] as [B, 1, C n]: one norm a sample, and another result than with one a channel."""
    arguments = draw(guidance, (3, 4, 37))
    flat = {k: v.view(3, 1, -1) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    per_sample, _ = check(place, flat)
    per_channel, _ = check(place, arguments)
    needs_sums = isinstance(guidance, APG) or getattr(guidance, "rescale", 0) > 0
    assert torch.equal(per_sample.view(3, 4, 37), per_channel) != needs_sums


@on_every_backend
def test_long_rows_keep_their_accuracy(place):
    """Sums over 21 latent frames of 32 x 32, whose first elements are far larger than the others."""
    arguments = draw(GUIDANCE["apg"], (1, 2, 21, 1024))
    for name in ("v_cond", "v_uncond"):
        arguments[name][:, :, 0, :7] *= 300
    check(place, arguments)


@on_every_backend
def test_prefix_is_clean_without_noise(place):
    values, noise = torch.randn(2, 2, 3, 2, 5)
    result, _ = step(place, draw(CFG(2.0), (2, 3, 4, 5)) | {"prefix": Prefix(values, time=0.5)})
    assert torch.equal(result[:, :, :2], values)
    for time, expected in ((1.0, noise), (0.0, values)):
        full = draw(None, (2, 3, 2, 5)) | {"prefix": Prefix(values, noise=noise, time=time)}
        assert torch.equal(step(place, full)[0], expected)


@on_every_backend
@every_guidance
def test_empty_and_strided_inputs(place, guidance):
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        result, _ = check(place, draw(guidance, shape))
        assert result.shape == shape
    check(place, draw(guidance, 0, row_offsets=torch.zeros(3, dtype=torch.int64)))
    arguments = draw(guidance, (3, 2, 4, 10))
    strided = {k: v[..., ::2].transpose(0, 1) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert not strided["x"].is_contiguous()
    check(place, strided)


@on_every_backend
def test_rows_without_a_direction(place):
    """v_cond = 0 has no direction to project on, and d = 0 no length to shorten; nothing may become NaN."""
    arguments = draw(APG(5.0, threshold=0.6), (1, 3, 40))
    arguments["v_cond"][0, 0] = 0
    arguments["v_uncond"][0, 1] = arguments["v_cond"][0, 1]
    arguments["v_cond"][0, 2] = arguments["v_uncond"][0, 2] = 0
    result, _ = check(place, arguments)
    assert torch.isfinite(result).all()


@on_every_backend
def test_inputs_stay_and_runs_repeat_bit_by_bit(place):
    arguments = draw_ragged(GUIDANCE["apg_momentum"])
    before = convert(arguments)
    first, second = step(place, arguments), step(place, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(tensors_of(before)[name], value) for name, value in tensors_of(arguments).items())


# gradient


@on_every_backend
@every_guidance
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients(place, guidance, ragged):
    arguments = draw_ragged(guidance) if ragged else draw(guidance, (2, 3, 4, 5), prefix=(2, 3, 1, 5))
    with flexkernels.backend(place[0]):
        found = gradients(flexkernels.flow_step, convert(arguments, place[1]))
    expected = gradients(flexkernels.flow_step_ref, convert(arguments, double=True))
    plain = gradients(flexkernels.flow_step_ref, arguments)
    assert set(found) == set(expected) >= {"x", "v_cond", "prefix.values", "prefix.noise"}
    for name, grad in found.items():
        assert_accurate(grad, plain[name], expected[name])


def test_reference_passes_gradcheck():
    """Ties the float64 gradients above, which autograd takes of the reference, to finite differences."""
    arguments = convert(draw(GUIDANCE["apg_momentum"], (1, 2, 5), prefix=(1, 2, 2)), double=True)
    leaves = {name: value.requires_grad_() for name, value in tensors_of(arguments).items()}

    def function(*values):
        return flexkernels.flow_step_ref(**with_tensors(arguments, dict(zip(leaves, values, strict=True))))

    assert "prefix.noise" in leaves and torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_one_tensor_passed_twice_gets_both_gradients():
    v = torch.randn(1, 2, 6, requires_grad=True)
    flexkernels.flow_step(torch.zeros(1, 2, 6), v, v, dt=1.0, guidance=CFG(3.0))[0].sum().backward()
    torch.testing.assert_close(v.grad, torch.ones_like(v))


def test_gradient_through_the_buffer_alone():
    arguments = draw(GUIDANCE["apg_momentum"], (1, 2, 6))
    v_cond = arguments["v_cond"].requires_grad_()
    flexkernels.flow_step(**arguments)[1].sum().backward()
    assert torch.equal(v_cond.grad, torch.ones_like(v_cond))


# dispatch, tracing


@every_guidance
def test_opcheck(guidance):
    kind = 0 if guidance is None else 1 + isinstance(guidance, APG)
    numbers = dataclasses.asdict(guidance) if guidance else {"scale": 1.0}
    rest = [float(numbers.get(name, 0.0)) for name in ("scale", "threshold", "eta", "momentum", "rescale")]
    names = ("x", "v_cond", "v_uncond", "momentum_buffer", "row_offsets")
    names = (*names, "prefix.values", "prefix.offsets", "prefix.noise", "scalars")
    for arguments in (draw(guidance, (2, 3, 4, 5), prefix=(2, 3, 1, 5)), draw_ragged(guidance)):
        for terms, grad in (([], True), ([torch.randn(arguments["x"].shape)] * 2, True), ([], False)):
            tensors = tensors_of(convert(arguments, DEVICE, grad=grad))
            terms = [term.to(DEVICE).requires_grad_(grad) for term in terms]
            weights = [0.5 - i for i in range(len(terms))]
            more = (terms, terms, [1.0, *weights], -0.05, weights, kind, *rest, 0.3, len(terms) > 0)
            tensors["scalars"] = None if grad else torch.rand(9, device=DEVICE)
            for name in ("flow_update",) if grad else ("flow_update", "flow_update_"):
                torch.library.opcheck(getattr(op, name).default, (*map(tensors.get, names), *more))


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
@every_guidance
def test_compiles_to_one_graph(compiler, guidance):
    if compiler == "inductor" and guidance is not GUIDANCE["cfg"]:
        pytest.skip("one guidance is enough for the slow compiler")
    arguments = convert(draw(guidance, (2, 3, 4, 5), prefix=(2, 3, 1, 5)), DEVICE)
    compiled = torch.compile(flexkernels.flow_step, fullgraph=True, backend=compiler)
    for result, expected in zip(compiled(**arguments), flexkernels.flow_step(**arguments), strict=True):
        assert (result is None and expected is None) or torch.equal(result, expected)
    found, expected = gradients(compiled, arguments), gradients(flexkernels.flow_step, arguments)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_new_sizes_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(flexkernels.flow_step, fullgraph=True, backend=counter, dynamic=True), []
    for batch, length in ((2, 10), (4, 30), (5, 31)):
        arguments = convert(draw(APG(3.0), (batch, 3, length)), DEVICE)
        torch.testing.assert_close(compiled(**arguments)[0], flexkernels.flow_step(**arguments)[0])
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        x = torch.empty(2, 3, 5, dtype=torch.bfloat16)
        before = torch.empty(x.shape)
        x_next, buffer = flexkernels.flow_step(x, x, x, dt=1.0, guidance=APG(momentum=-0.5), momentum_buffer=before)
    assert (x_next.shape, x_next.dtype) == (x.shape, torch.bfloat16)
    assert (buffer.shape, buffer.dtype) == (x.shape, torch.float32)


@needs_gpu
def test_cuda_graph_replays():
    arguments = convert(draw_ragged(GUIDANCE["apg_momentum"]), "cuda")
    flexkernels.flow_step(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flexkernels.flow_step(**arguments)
    arguments["x"].copy_(torch.randn_like(arguments["x"]))
    graph.replay()
    for result, expected in zip(results, flexkernels.flow_step(**arguments), strict=True):
        assert torch.equal(result, expected)


@needs_gpu
def test_offsets_beyond_31_bits():
    x = torch.zeros(3, 2**30, 1, dtype=torch.bfloat16, device="cuda").view(3, 2**15, 2**15)
    x[-1, -1] = 1
    result, _ = flexkernels.flow_step(x, x, dt=1.0)
    assert (result[-1, -1] == 2).all() and (result[0, 0] == 0).all()


# wrong input

X = torch.zeros(2, 3, 8)
FLAT = torch.zeros(10)
OFFSETS = torch.tensor([0, 4, 10])
WRONG = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be float32 or bfloat16 or float16.*got int64"),
    ({"x": FLAT, "v_cond": FLAT}, ValueError, r"x must have the shape \[B, C, \.\.\.\] when there are no row_offsets"),
    ({"v_cond": X[:1]}, ValueError, r"v_cond must have the shape \[2, 3, 8\] of x, got \[1, 3, 8\]"),
    ({"v_cond": X.to("meta")}, ValueError, "v_cond must be on cpu like x, got meta"),
    ({"v_uncond": X}, ValueError, "v_uncond must be None without guidance"),
    ({"guidance": CFG(2.0)}, TypeError, "v_uncond must be a torch.Tensor, got NoneType"),
    ({"guidance": CFG(2.0), "v_uncond": X.half()}, TypeError, "v_uncond must be float32, got float16"),
    ({"guidance": 2.0, "v_uncond": X}, TypeError, "guidance must be CFG, APG or None, got float"),
    ({"guidance": CFG(lambda t: t), "v_uncond": X}, TypeError, "guidance scale must be a number in one step"),
    ({"dt": "1"}, TypeError, "dt must be a number, got str"),
    ({"dt": math.nan}, ValueError, "dt must be finite, got nan"),
    ({"dt": -math.inf}, ValueError, "dt must be finite, got -inf"),
    ({"momentum_buffer": X}, ValueError, "momentum_buffer must be None unless guidance is APG"),
    (
        {"guidance": APG(momentum=-0.5), "v_uncond": X},
        ValueError,
        r"momentum_buffer must be given with a momentum \(zeros in the first step\), got None",
    ),
    ({"guidance": APG(), "v_uncond": X, "momentum_buffer": X.half()}, TypeError, "momentum_buffer must be float32"),
    ({"guidance": APG(), "v_uncond": X, "momentum_buffer": X[0]}, ValueError, "momentum_buffer must have the shape"),
    (
        {"row_offsets": OFFSETS},
        ValueError,
        r"x must be flat \[total\] when row_offsets are given, got shape \[2, 3, 8\]",
    ),
    ({"x": FLAT, "v_cond": FLAT, "row_offsets": OFFSETS.int()}, TypeError, "row_offsets must be int64, got int32"),
    (
        {"x": FLAT, "v_cond": FLAT, "row_offsets": OFFSETS[:0]},
        ValueError,
        r"row_offsets must have rows \+ 1 entries, got 0",
    ),
    ({"prefix": X}, TypeError, "prefix must be a Prefix or None, got Tensor"),
    ({"prefix": Prefix(X.half())}, TypeError, "prefix.values must be float32.*got float16"),
    (
        {"prefix": Prefix(X[:, :2])},
        ValueError,
        r"prefix.values must be \[B, C, k, \.\.\.\] like x \[2, 3, 8\], got shape \[2, 2, 8\]",
    ),
    ({"prefix": Prefix(torch.zeros(2, 3, 9))}, ValueError, r"prefix.values must be \[B, C, k, \.\.\.\] like x"),
    ({"prefix": Prefix(X.to("meta"))}, ValueError, "prefix.values must be on cpu like x, got meta"),
    ({"prefix": Prefix(X, noise=X[:1])}, ValueError, "prefix.noise must have the shape"),
    ({"prefix": Prefix(X, noise=X.half())}, TypeError, "prefix.noise must be float32.*got float16"),
    ({"prefix": Prefix(X, torch.arange(7))}, ValueError, "prefix.values must be flat when there are prefix.offsets"),
    ({"prefix": Prefix(X[0, 0], torch.arange(3))}, ValueError, r"prefix.offsets must have the shape \[7\]"),
    ({"prefix": Prefix(X[0, 0], torch.arange(7).int())}, TypeError, "prefix.offsets must be int64, got int32"),
    (
        {"x": FLAT, "v_cond": FLAT, "row_offsets": OFFSETS, "prefix": Prefix(FLAT)},
        ValueError,
        "prefix.offsets must be given along with row_offsets",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    for function in (flexkernels.flow_step, flexkernels.flow_step_ref):
        with pytest.raises(error, match=message):
            function(**{"x": X, "v_cond": X, "dt": -0.1} | change)


def test_float64_is_for_the_reference_alone():
    with pytest.raises(TypeError, match="x must be float32 or bfloat16 or float16, got float64"):
        flexkernels.flow_step(X.double(), X.double(), dt=1.0)


@on_every_backend
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4, 9], "row_offsets must run from 0 to 10, got 0 to 9"),
        ([1, 4, 10], "row_offsets must run from 0 to 10, got 1 to 10"),
        ([0, 11, 10], r"row_offsets must never fall, got \[0, 11, 10\]"),
    ],
)
def test_wrong_offsets_are_refused_on_the_cpu(place, offsets, message):
    if place[1] != "cpu":
        pytest.skip("looking at offsets would wait for the GPU")
    with pytest.raises(ValueError, match=message):
        step(place, {"x": FLAT, "v_cond": FLAT, "dt": 1.0, "row_offsets": torch.tensor(offsets)})


@on_every_backend
def test_a_prefix_longer_than_its_row_is_refused_on_the_cpu(place):
    if place[1] != "cpu":
        pytest.skip("looking at offsets would wait for the GPU")
    arguments = {"x": FLAT, "v_cond": FLAT, "dt": 1.0, "row_offsets": OFFSETS}
    with pytest.raises(ValueError, match=r"prefix\.offsets must give no row more than its elements"):
        step(place, arguments | {"prefix": Prefix(FLAT[:5], torch.tensor([0, 5, 5]))})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scale": "3"}, TypeError, "guidance scale must be a number, got str"),
        ({"scale": math.inf}, ValueError, "guidance scale must be finite"),
        ({"threshold": -1.0}, ValueError, "APG threshold must be at least 0, got -1.0"),
        ({"eta": None}, TypeError, "APG eta must be a number, got NoneType"),
        ({"momentum": math.nan}, ValueError, "APG momentum must be finite, got nan"),
    ],
)
def test_wrong_guidance_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        APG(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"values": None}, TypeError, "Prefix values must be a torch.Tensor, got NoneType"),
        ({"offsets": [0, 1]}, TypeError, "Prefix offsets must be a torch.Tensor, got list"),
        ({"noise": 0.0}, TypeError, "Prefix noise must be a torch.Tensor, got float"),
        ({"time": 1.5}, ValueError, "Prefix time must be at most 1, got 1.5"),
        ({"time": -0.1}, ValueError, "Prefix time must be at least 0, got -0.1"),
        ({"time": torch.zeros(1)}, TypeError, "Prefix time must be a number, got Tensor"),
    ],
)
def test_wrong_prefix_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        Prefix(**{"values": X} | settings)

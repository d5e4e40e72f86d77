import itertools
import math

import pytest
import torch
from helpers import DEVICE, FLOATS, inductor, interpreted, needs_gpu, on_every_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import fsq_math
from flexkernels.fsq_math import IDS, Form

PUBLISHED = [8, 8, 8, 5, 5, 5]
LEVEL_SETS = [PUBLISHED, [2], [3, 2], [256, 255, 17], [7] * 16, [2, 255] * 7]
SIZES = [1, 17, 129, 151]
op = torch.ops.flexkernels


def draw(rows, levels, dtype=torch.float32, device="cpu"):
    # drawn in its own dtype; wide enough to reach the outer levels
    return (2 * torch.randn(rows, len(levels))).to(dtype).to(device)


def quantize(place, z, levels, **settings):
    with flexkernels.backend(place[0]):
        codes, ids = flexkernels.fsq_quantize(z.to(place[1]), levels, **settings)
    return None if codes is None else codes.cpu(), None if ids is None else ids.cpu()


def assert_codes_equal(place, codes, expected):
    assert codes.dtype == expected.dtype
    if interpreted(place) and codes.dtype == torch.bfloat16:
        torch.testing.assert_close(codes, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    else:
        assert torch.equal(codes, expected)


def written_out(z, levels):
    """The formula of the paper one number at a time, in Python's double precision: levels and id."""
    result, index, basis = [], 0, 1
    for value, level in zip(z.tolist(), levels, strict=True):
        half = (level - 1) * (1 + 1e-3) / 2
        offset = 0.0 if level % 2 else 0.5
        bound = math.tanh(value + math.atanh(offset / half)) * half - offset
        result.append(round(bound) / (level // 2))
        index, basis = index + (round(bound) + level // 2) * basis, basis * level
    return result, index


def test_reference_is_the_formula_of_the_paper():
    z = draw(200, PUBLISHED)
    codes, ids = flexkernels.fsq_quantize_ref(z, PUBLISHED)
    expected = [written_out(row, PUBLISHED) for row in z]
    assert ids.tolist() == [index for _, index in expected]
    torch.testing.assert_close(codes, torch.tensor([row for row, _ in expected]), rtol=1e-6, atol=1e-7)


@on_every_backend
def test_agrees_on_random_input(place):
    z = draw(500 if interpreted(place) else 163840, PUBLISHED)
    codes, ids = quantize(place, z, PUBLISHED)
    expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z, PUBLISHED)
    assert int((codes != expected_codes).sum()) == 0
    assert int((ids != expected_ids).sum()) == 0
    assert len(expected_ids.unique()) > 400


@on_every_backend
@pytest.mark.parametrize("first", range(2, 257, 16))
def test_agrees_next_to_every_boundary(place, first):
    if place[0] == "reference" and place[1] != "cpu":
        pytest.skip("the reference evaluates the formula with the GPU's tanh")
    levels = [min(first + d, 256) for d in range(16)]
    boundary = fsq_math.thresholds(tuple(levels), torch.device("cpu")).t()
    ordinal = fsq_math.ordinal(boundary.contiguous())
    # the boundary itself, one float below and one above it
    z = torch.cat([fsq_math.from_ordinal(ordinal + step) for step in (-1, 0, 1)])
    z = torch.where(torch.isfinite(z), z, 0)
    codes, _ = quantize(place, z, levels, ids=False)
    expected, _ = flexkernels.fsq_quantize_ref(z, levels, ids=False)
    assert torch.equal(codes, expected)
    # the step really lies between the boundary and the float above it
    n = len(boundary)
    steps = (codes[2 * n :] - codes[n : 2 * n]) * torch.tensor([level // 2 for level in levels])
    assert (steps.round() == torch.isfinite(boundary)).all()


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_level_sets_and_dtypes(place, dtype, levels):
    z = draw(151, levels, dtype)
    fits = math.prod(levels) < 2**63
    codes, ids = quantize(place, z, levels, ids=fits)
    expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z, levels, ids=fits)
    assert_codes_equal(place, codes, expected_codes)
    if fits:
        assert torch.equal(ids, expected_ids)
        with flexkernels.backend(place[0]):
            back = flexkernels.fsq_dequantize(ids.to(place[1]), levels, dtype=dtype).cpu()
        assert_codes_equal(place, back, expected_codes)


VARIANTS = [Form(symmetric, clamp) for symmetric in (False, True) for clamp in (False, True)][1:]


def written_out_variant(value, level, form):
    """A variant's formula in Python's double precision: the code, and the value whose floor is taken."""
    squash = (lambda x: min(max(x, -1.0), 1.0)) if form.clamp else math.tanh
    if form.symmetric:
        bound = (level - 1) * (squash(value) + 1) / 2
        return math.floor(bound + 0.5) * 2 / (level - 1) - 1, bound + 0.5
    half = (level - 1) * (1 + 1e-3) / 2
    offset = 0.0 if level % 2 else 0.5
    bound = squash(value + (offset / half if form.clamp else math.atanh(offset / half))) * half - offset
    return round(bound) / (level // 2), bound + 0.5


@pytest.mark.parametrize("form", VARIANTS, ids=str)
def test_variants_reference_is_the_formula(form):
    z = draw(200, PUBLISHED)
    codes, _ = flexkernels.fsq_quantize_ref(z, PUBLISHED, **form._asdict())
    for row, code in zip(z.tolist(), codes.tolist(), strict=True):
        for value, level, got in zip(row, PUBLISHED, code, strict=True):
            expected, before = written_out_variant(value, level, form)
            # next to a step, float32 may round to the other side
            assert got == pytest.approx(expected, abs=1e-6) or abs(before - round(before)) < 1e-4


@on_every_backend
@pytest.mark.parametrize(
    "levels, dtype", [(PUBLISHED, torch.float32), ([3, 2], torch.bfloat16), ([2, 255] * 7, torch.float16)], ids=str
)
@pytest.mark.parametrize("form", VARIANTS, ids=str)
def test_variants_agree_on_every_backend(place, form, levels, dtype):
    z = torch.cat([draw(151, levels, dtype), torch.zeros(1, len(levels), dtype=dtype)])
    z[3, 0], z[4, 0], z[5, 0] = math.nan, math.inf, -math.inf
    fits = math.prod(levels) < 2**63
    codes, ids = quantize(place, z, levels, ids=fits, **form._asdict())
    expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z, levels, ids=fits, **form._asdict())
    assert_codes_equal(place, codes, expected_codes)
    if fits:
        assert torch.equal(ids, expected_ids)
        with flexkernels.backend(place[0]):
            back = flexkernels.fsq_dequantize(ids.to(place[1]), levels, symmetric=form.symmetric, dtype=dtype).cpu()
        assert_codes_equal(place, back, expected_codes)
        assert torch.equal(
            back, flexkernels.fsq_dequantize_ref(ids, levels, symmetric=form.symmetric, dtype=dtype)
        ) or (interpreted(place) and dtype == torch.bfloat16)


@pytest.mark.parametrize("form", VARIANTS, ids=str)
def test_variants_next_to_every_boundary(form):
    levels = [2, 3, 4, 5, 8, 16, 17, 33, 64, 255, 256]
    ordinal = fsq_math.ordinal(fsq_math.thresholds(tuple(levels), torch.device("cpu"), form).t().contiguous())
    z = torch.cat([fsq_math.from_ordinal(ordinal + step) for step in range(-40, 41)])
    z = torch.where(torch.isfinite(z), z, 0)
    settings = dict(ids=False, **form._asdict())
    assert torch.equal(
        flexkernels.fsq_quantize(z, levels, **settings)[0], flexkernels.fsq_quantize_ref(z, levels, **settings)[0]
    )


@pytest.mark.parametrize("form", VARIANTS, ids=str)
def test_variants_gradient_passes_straight_through(form):
    levels, z = torch.tensor(PUBLISHED), draw(50, PUBLISHED).requires_grad_()
    squash = (lambda x: x.clamp(-1, 1)) if form.clamp else torch.tanh
    if form.symmetric:
        value = squash(z)
    else:
        half, offset = (levels - 1) * (1 + 1e-3) / 2, 0.5 * (levels % 2 == 0)
        shift = offset / half if form.clamp else torch.atanh(offset / half)
        value = (squash(z + shift) * half - offset) / (levels // 2)
    grad = torch.randn(50, 6)
    codes, _ = flexkernels.fsq_quantize(z, PUBLISHED, **form._asdict())
    torch.testing.assert_close(torch.autograd.grad(codes, z, grad), torch.autograd.grad(value, z, grad))


@on_every_backend
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("ids_dtype", IDS)
def test_odd_sizes_and_either_result(place, rows, ids_dtype):
    z = draw(rows, PUBLISHED)
    codes, ids = quantize(place, z, PUBLISHED, ids_dtype=ids_dtype)
    assert ids.dtype == ids_dtype
    assert torch.equal(ids.long(), flexkernels.fsq_quantize_ref(z, PUBLISHED)[1])
    only_codes, none = quantize(place, z, PUBLISHED, ids=False)
    assert none is None and torch.equal(only_codes, codes)
    none, only_ids = quantize(place, z, PUBLISHED, codes=False, ids_dtype=ids_dtype)
    assert none is None and torch.equal(only_ids, ids)
    with flexkernels.backend(place[0]):
        assert torch.equal(flexkernels.fsq_dequantize(ids.to(place[1]), PUBLISHED).cpu(), codes)


@on_every_backend
def test_strided_input_batch_shape_and_repeatability(place):
    z = torch.randn(6, 2 * 11, 3, device=place[1]).permute(2, 1, 0)[:, ::2]
    assert not z.is_contiguous()
    codes, ids = quantize(place, z, PUBLISHED)
    assert codes.shape == (3, 11, 6) and ids.shape == (3, 11)
    expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z.cpu(), PUBLISHED)
    assert torch.equal(codes, expected_codes) and torch.equal(ids, expected_ids)
    again = quantize(place, z, PUBLISHED)
    assert torch.equal(again[0], codes) and torch.equal(again[1], ids)
    with flexkernels.backend(place[0]):
        back = flexkernels.fsq_dequantize(ids.t().to(place[1]), PUBLISHED)
    assert torch.equal(back.cpu().transpose(0, 1), codes)


@on_every_backend
def test_empty_nan_and_infinity(place):
    codes, ids = quantize(place, torch.zeros(4, 0, 6), PUBLISHED)
    assert codes.shape == (4, 0, 6) and ids.shape == (4, 0)
    with flexkernels.backend(place[0]):
        assert flexkernels.fsq_dequantize(ids.to(place[1]), PUBLISHED).shape == (4, 0, 6)
    z = torch.tensor([[math.nan], [math.inf], [-math.inf], [0.0], [-0.0]])
    _, ids = quantize(place, z, [8])
    assert ids.tolist() == [0, 7, 0, 4, 4]


@on_every_backend
def test_largest_codebooks(place):
    levels = [128] * 8 + [127]
    z = torch.full((3, 9), 9.0)
    assert quantize(place, z, levels)[1].tolist() == [math.prod(levels) - 1] * 3
    levels = [128] * 4 + [7]
    _, ids = quantize(place, z[:, :5], levels, ids_dtype=torch.int32)
    assert ids.tolist() == [math.prod(levels) - 1] * 3
    with flexkernels.backend(place[0]):
        assert (flexkernels.fsq_dequantize(ids.to(place[1]), levels).cpu() > 0.7).all()
    # 65,536 ids fill uint16
    levels = [16] * 4
    _, ids = quantize(place, z[:, :4], levels, ids_dtype=torch.uint16)
    assert ids.tolist() == [65535] * 3
    with flexkernels.backend(place[0]):
        assert (flexkernels.fsq_dequantize(ids.to(place[1]), levels).cpu() == 7 / 8).all()


def inverse(codes, levels):
    """A z of the level of each code, which is a value before rounding."""
    half, offset, shift = fsq_math.bound_terms(tuple(levels), codes)
    bound = codes.float() * torch.tensor([level // 2 for level in levels])
    return torch.atanh((bound + offset) / half) - shift


@on_every_backend
@pytest.mark.parametrize("ids_dtype", IDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_id_survives_the_round_trip(place, dtype, ids_dtype):
    # the interpreter takes half a minute for all: it sees all in one dtype, and some in the others
    step = 13 if interpreted(place) and (dtype, ids_dtype) != (torch.float32, torch.int64) else 1
    ids = torch.arange(0, math.prod(PUBLISHED), step).to(ids_dtype)
    with flexkernels.backend(place[0]):
        codes = flexkernels.fsq_dequantize(ids.to(place[1]), PUBLISHED, dtype=dtype).cpu()
    assert codes.dtype == dtype and len(codes.unique(dim=0)) == len(ids)
    z = inverse(codes, PUBLISHED).to(dtype)
    found_codes, found = quantize(place, z, PUBLISHED, ids_dtype=ids_dtype)
    assert found.dtype == ids_dtype and torch.equal(found, ids)
    assert torch.equal(found_codes, codes)


# gradient


def expected_gradient(z, levels, grad):
    z = z.detach().double().requires_grad_()
    value = fsq_math.bound(z, tuple(levels)) / torch.tensor([level // 2 for level in levels], device=z.device)
    return torch.autograd.grad(value, z, grad.double())[0]


def test_bound_passes_gradcheck():
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: fsq_math.bound(value, tuple(PUBLISHED)), z)


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_straight_through_gradient(place, dtype):
    z = draw(33, PUBLISHED, dtype, place[1]).requires_grad_()
    with flexkernels.backend(place[0]):
        codes, ids = flexkernels.fsq_quantize(z, PUBLISHED)
    assert codes.requires_grad and not ids.requires_grad
    grad = torch.randn_like(codes)
    codes.backward(grad)
    assert z.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    # 1 - tanh**2 in float32 loses its last digits where it is near 0
    torch.testing.assert_close(z.grad.double(), expected_gradient(z, PUBLISHED, grad), rtol=2 * eps, atol=1e-6)


def test_no_gradient_through_ids_alone():
    z = torch.randn(4, 6, requires_grad=True)
    codes, ids = flexkernels.fsq_quantize(z, PUBLISHED, codes=False)
    assert codes is None and not ids.requires_grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", [fsq_math.PAPER, *VARIANTS], ids=str)
def test_forward_mode_is_straight_through_too(form, dtype):
    z = draw(33, PUBLISHED, dtype)
    z[3, 0] = math.nan
    tangent, grad = torch.randn(2, 33, 6).to(dtype)
    run = lambda z: flexkernels.fsq_quantize(z, PUBLISHED, **form._asdict())[0]  # noqa: E731
    codes, forward = torch.func.jvp(run, (z,), (tangent,))
    assert torch.equal(codes, run(z))
    # without the row of the NaN, whose derivative is NaN
    z, tangent, grad, forward = (t[4:] for t in (z, tangent, grad, forward))
    leaf = z.requires_grad_()
    run(leaf).backward(grad)
    both = (leaf.grad.double() * tangent.double()).sum(), (grad.double() * forward.double()).sum()
    torch.testing.assert_close(*both, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-3)
    assert forward.abs().max() > 0


def test_second_derivative():
    z, grad = draw(20, PUBLISHED).requires_grad_(), torch.randn(20, 6)

    def second(function, z):
        (first,) = torch.autograd.grad(function(z), z, grad.to(z), create_graph=True)
        return torch.autograd.grad(first.square().sum(), z)[0]

    found = second(lambda z: flexkernels.fsq_quantize(z, PUBLISHED)[0], z)
    exact = second(lambda z: fsq_math.smooth(z, PUBLISHED), z.detach().double().requires_grad_())
    assert exact.abs().max() > 0
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


# dispatch, tracing


@pytest.mark.parametrize(("codes", "ids"), [(True, True), (True, False), (False, True)])
def test_opcheck(codes, ids):
    for shape in ((5, 7, 6), (0, 6)):
        z = torch.randn(shape, device=DEVICE, requires_grad=codes)
        torch.library.opcheck(op.fsq_quantize.default, (z, PUBLISHED, codes, ids, torch.int32, False, False))
    ids = torch.arange(10, device=DEVICE).view(2, 5)
    torch.library.opcheck(op.fsq_dequantize.default, (ids, PUBLISHED, torch.bfloat16, False))


def round_trip(z):
    codes, ids = flexkernels.fsq_quantize(z, PUBLISHED)
    return codes, flexkernels.fsq_dequantize(ids, PUBLISHED) + 1


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compiles_to_one_graph(compiler):
    z = torch.randn(3, 5, 6, device=DEVICE, requires_grad=True)
    codes, back = torch.compile(round_trip, fullgraph=True, backend=compiler)(z)
    assert torch.equal(codes + 1, back)
    codes.sum().backward()
    torch.testing.assert_close(
        z.grad.double(), expected_gradient(z, PUBLISHED, torch.ones_like(z)), rtol=1e-5, atol=1e-6
    )


def test_new_lengths_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(round_trip, fullgraph=True, backend=counter)
    for rows in (5, 9, 30):
        z = torch.randn(rows, 6, device=DEVICE)
        torch._dynamo.mark_dynamic(z, 0)
        assert torch.equal(compiled(z)[0], flexkernels.fsq_quantize(z, PUBLISHED)[0])
    assert counter.frame_count == 1


def test_fake_tensors_tell_shapes_and_leave_the_cache_alone():
    fsq_math.thresholds.cache_clear()
    with FakeTensorMode():
        codes, ids = flexkernels.fsq_quantize(torch.empty(3, 5, 6, dtype=torch.float16), PUBLISHED)
        assert codes.shape == (3, 5, 6) and codes.dtype == torch.float16
        assert ids.shape == (3, 5) and ids.dtype == torch.int64
    assert fsq_math.thresholds.cache_info().currsize == 0


def test_thresholds_made_in_inference_mode_serve_training_later():
    fsq_math.thresholds.cache_clear()
    with torch.inference_mode():
        flexkernels.fsq_quantize(torch.randn(4, 6), PUBLISHED)
    assert not fsq_math.thresholds(tuple(PUBLISHED), torch.device("cpu")).is_inference()
    z = torch.randn(4, 6, requires_grad=True)
    flexkernels.fsq_quantize(z, PUBLISHED)[0].sum().backward()
    assert z.grad is not None


@needs_gpu
def test_cuda_graph_replays():
    z = draw(1000, PUBLISHED, device="cuda")
    flexkernels.fsq_quantize(z, PUBLISHED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, ids = flexkernels.fsq_quantize(z, PUBLISHED)
    z.copy_(draw(1000, PUBLISHED))
    graph.replay()
    expected_codes, expected_ids = flexkernels.fsq_quantize(z, PUBLISHED)
    assert torch.equal(codes, expected_codes) and torch.equal(ids, expected_ids)


@needs_gpu
def test_offsets_beyond_31_bits():
    z = torch.zeros(2**29 + 3, 6, dtype=torch.bfloat16, device="cuda")
    z[-1] = 9
    _, ids = flexkernels.fsq_quantize(z, PUBLISHED, codes=False)
    assert int(ids[-1]) == math.prod(PUBLISHED) - 1 and int(ids[0]) == int(ids[-2])


# wrong input

Z = torch.zeros(2, 6)
WRONG_QUANTIZE = [
    (([1.0], PUBLISHED), {}, TypeError, "z must be a torch.Tensor, got list"),
    ((Z.double(), PUBLISHED), {}, TypeError, "z must be float32 or bfloat16 or float16, got float64"),
    ((Z.long(), PUBLISHED), {}, TypeError, "z must be .*got int64"),
    ((Z, [8, 8]), {}, ValueError, r"z must have the shape \[..., 2\].*got \[2, 6\]"),
    ((torch.tensor(1.0), [8]), {}, ValueError, r"z must have the shape \[..., 1\].*got \[\]"),
    ((Z, []), {}, ValueError, "levels must not be empty"),
    ((Z, 8), {}, TypeError, "levels must be a list or tuple of ints, got int"),
    ((Z, [8, 8, 8, 5, 5, 5.0]), {}, TypeError, "levels must hold ints alone, got 5.0"),
    ((Z, [8, 8, 8, 5, 5, 1]), {}, ValueError, "levels must lie between 2 and 256, got 1"),
    ((Z, [8, 8, 8, 5, 5, 257]), {}, ValueError, "levels must lie between 2 and 256, got 257"),
    ((torch.zeros(2, 17), [2] * 17), {}, ValueError, "levels must have at most 16 entries, got 17"),
    ((Z, PUBLISHED), {"codes": False, "ids": False}, ValueError, "codes or ids must be asked for"),
    (
        (Z, PUBLISHED),
        {"ids_dtype": torch.int16},
        TypeError,
        "ids_dtype must be int64 or int32 or uint16, got torch.int16",
    ),
    (
        (Z, [64] * 6),
        {"ids_dtype": torch.int32},
        ValueError,
        "multiply to at most 2147483647 for int32 ids, got 68719476736",
    ),
    ((torch.zeros(2, 5), [128] * 4 + [8]), {"ids_dtype": torch.int32}, ValueError, "for int32 ids, got 2147483648"),
    (
        (torch.zeros(2, 4), [16, 16, 16, 17]),
        {"ids_dtype": torch.uint16},
        ValueError,
        "multiply to at most 65536 for uint16 ids, got 69632",
    ),
    ((torch.zeros(2, 9), [128] * 9), {}, ValueError, "for int64 ids, got 9223372036854775808"),
    ((torch.zeros(2, 16), [16] * 16), {}, ValueError, "levels must multiply to at most 9223372036854775807 for int64"),
]


@pytest.mark.parametrize(("args", "settings", "error", "message"), WRONG_QUANTIZE)
def test_wrong_input_is_refused(args, settings, error, message):
    for function in (flexkernels.fsq_quantize, flexkernels.fsq_quantize_ref):
        with pytest.raises(error, match=message):
            function(*args, **settings)


def test_a_codebook_beyond_its_ids_still_gives_codes():
    codes, ids = flexkernels.fsq_quantize(torch.zeros(2, 16), [256] * 16, ids=False)
    assert ids is None and torch.equal(codes, torch.zeros(2, 16))


@needs_gpu
def test_ids_on_the_gpu_are_looked_at_on_request(monkeypatch):
    ids = torch.tensor([0, 40], device="cuda")
    monkeypatch.setenv("FLEXKERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="ids must lie between 0 and 39, got 0 to 40"):
        flexkernels.fsq_dequantize(ids, [8, 5])


@needs_gpu
def test_ids_on_the_gpu_are_not_looked_at_unasked():
    codes = flexkernels.fsq_dequantize(torch.tensor([-1, 40, 2**62], device="cuda"), [8, 5])
    assert codes.shape == (3, 2) and codes.abs().max() <= 1


def test_wrong_ids_are_refused():
    for function, levels, dtype in itertools.product((flexkernels.fsq_dequantize,), ([8, 5],), IDS):
        for bad in (40,) if dtype == torch.uint16 else (-1, 40):
            with pytest.raises(ValueError, match="ids must lie between 0 and 39, got"):
                function(torch.tensor([0, bad], dtype=dtype), levels)
    with pytest.raises(TypeError, match="ids must be int64 or int32 or uint16, got float32"):
        flexkernels.fsq_dequantize(torch.zeros(2), [8, 5])
    with pytest.raises(TypeError, match=r"dtype must be float32 or bfloat16 or float16, got torch.float64"):
        flexkernels.fsq_dequantize(torch.zeros(2, dtype=torch.int64), [8, 5], dtype=torch.float64)
    with pytest.raises(ValueError, match="levels must multiply to at most"):
        flexkernels.fsq_dequantize(torch.zeros(2, dtype=torch.int64), [16] * 16)

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, FLOATS, assert_accurate, inductor, interpreted, needs_gpu, on_every_backend
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import fsq_math

PUBLISHED = [8, 8, 8, 5, 5, 5]
LEVEL_SETS = [PUBLISHED, [2], [3, 2], [256, 255, 17], [7] * 16, [5] * 7]
op = torch.ops.flexkernels


def draw_project(rows, width, levels, dtype=torch.float32):
    """hidden, weight, bias; z has a deviation near 2, so that it reaches the outer levels."""
    hidden = 3 * torch.randn(rows, width) + torch.randn(rows, 1)
    weight = 2 * torch.randn(len(levels), width) / width**0.5
    return hidden.to(dtype), weight.to(dtype), (0.2 * torch.randn(len(levels))).to(dtype)


def project(place, arguments, levels, **settings):
    with flexkernels.backend(place[0]):
        results = flexkernels.fsq_project_quantize(*(a.to(place[1]) for a in arguments), levels, **settings)
    return tuple(result.cpu() for result in results) if isinstance(results, tuple) else results.cpu()


def exact_z(hidden, weight, bias, eps=1e-5):
    return F.linear(F.layer_norm(hidden.double(), hidden.shape[1:], eps=eps), weight.double(), bias.double())


def assert_same_but_at_thresholds(codes, arguments, levels):
    """Codes are those of z in float64, but where it is within rounding of a threshold; such z are few."""
    z = exact_z(*arguments)
    expected, _ = flexkernels.fsq_quantize_ref(z.float(), levels, ids=False)
    differ = codes.float() != expected.to(codes.dtype).float()
    thresholds = fsq_math.thresholds(tuple(levels), torch.device("cpu")).double()
    distance = (z.unsqueeze(-1) - thresholds).abs().amin(-1)
    # terms of the sum, each rounded to float32 a few times
    terms = F.linear(F.layer_norm(arguments[0].double(), arguments[0].shape[1:]).abs(), arguments[1].double().abs())
    rounding = 8 * torch.finfo(torch.float32).eps * (terms + z.abs() + 1)
    assert (distance[differ] <= rounding[differ]).all()
    assert differ.sum() <= 1 + 1e-4 * differ.numel()


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_project_level_sets_and_dtypes(place, dtype, levels):
    arguments = draw_project(37, 193, levels, dtype)
    ids, codes = project(place, arguments, levels, return_codes=True)
    assert codes.dtype == dtype and ids.dtype == torch.int64
    if not (interpreted(place) and dtype == torch.bfloat16):
        # the interpreter cuts bfloat16 off instead of rounding
        assert_same_but_at_thresholds(codes, arguments, levels)
        assert torch.equal(flexkernels.fsq_dequantize(ids, levels, dtype=dtype), codes)
    assert torch.equal(project(place, arguments, levels), ids)


@on_every_backend
@pytest.mark.parametrize("width", [1, 5, 16, 129, 1152])
@pytest.mark.parametrize("rows", [1, 17, 151])
def test_project_odd_sizes(place, rows, width):
    arguments = draw_project(rows, width, PUBLISHED)
    ids, codes = project(place, arguments, PUBLISHED, return_codes=True, ids_dtype=torch.int32)
    assert ids.dtype == torch.int32
    assert_same_but_at_thresholds(codes, arguments, PUBLISHED)
    assert torch.equal(flexkernels.fsq_dequantize(ids, PUBLISHED), codes)


def test_project_at_size_differs_from_the_formula_at_thresholds_alone():
    arguments = draw_project(4096, 1152, PUBLISHED)
    ids, codes = flexkernels.fsq_project_quantize(*arguments, PUBLISHED, return_codes=True)
    assert_same_but_at_thresholds(codes, arguments, PUBLISHED)
    assert int((ids != flexkernels.fsq_project_quantize_ref(*arguments, PUBLISHED)).sum()) <= 2


@on_every_backend
def test_project_far_from_zero(place):
    """A mean of a thousand deviations: the sums are over centred values."""
    hidden, weight, bias = draw_project(33, 256, PUBLISHED)
    arguments = hidden + 3000, weight, bias
    _, codes = project(place, arguments, PUBLISHED, return_codes=True)
    z, eps = exact_z(*arguments), 1e-3
    low, high = (flexkernels.fsq_quantize_ref((z + shift).float(), PUBLISHED, ids=False)[0] for shift in (-eps, eps))
    assert ((codes == low) | (codes == high)).all()


@on_every_backend
def test_project_empty_nan_and_strides(place):
    arguments = draw_project(0, 8, PUBLISHED)
    ids, codes = project(place, arguments, PUBLISHED, return_codes=True)
    assert ids.shape == (0,) and codes.shape == (0, 6)
    hidden, weight, bias = draw_project(6, 48, PUBLISHED)
    hidden[2, 5] = torch.nan
    ids = project(place, (hidden, weight, bias), PUBLISHED)
    assert ids[2] == 0 and (ids[[0, 1, 3, 4, 5]] != 0).any()
    strided = hidden.repeat(1, 2).t().contiguous().t()[:, :48], weight.t().contiguous().t(), bias
    assert torch.equal(project(place, strided, PUBLISHED), ids)
    assert torch.equal(project(place, strided, PUBLISHED), ids)


@on_every_backend
def test_project_gradients(place):
    arguments = draw_project(23, 40, PUBLISHED)
    leaves = [a.to(place[1]).requires_grad_() for a in arguments]
    with flexkernels.backend(place[0]):
        ids, codes = flexkernels.fsq_project_quantize(*leaves, PUBLISHED, return_codes=True)
    assert not ids.requires_grad
    grad = torch.randn(23, 6)
    codes.backward(grad.to(place[1]))

    def formula(dtype):
        inputs = [a.to(dtype).requires_grad_() for a in arguments]
        z = F.linear(F.layer_norm(inputs[0], (40,), eps=1e-5), *inputs[1:])
        value = fsq_math.bound(z, tuple(PUBLISHED)) / torch.tensor([level // 2 for level in PUBLISHED])
        return torch.autograd.grad(value, inputs, grad.to(dtype))

    for leaf, plain, exact in zip(leaves, formula(torch.float32), formula(torch.float64), strict=True):
        assert_accurate(leaf.grad, plain, exact)


# fsq_embed


def draw_embed(rows, width, levels=PUBLISHED, dtype=torch.float32, tables=True):
    arguments = {
        "ids": torch.randint(math.prod(levels), (rows,)),
        "weight": torch.randn(width, len(levels)).to(dtype),
        "bias": torch.randn(width).to(dtype),
    }
    if tables:
        arguments |= {
            "positions": torch.randn(9, width).to(dtype),
            "position_index": torch.randint(9, (rows,), dtype=torch.int32),
            "tokens": torch.randn(3, width).to(dtype),
            "token_index": torch.randint(-4, 3, (rows,), dtype=torch.int32),
        }
    return arguments


def moved(arguments, device=None, double=False, grad=False):
    def change(value):
        value = value.to(device or value.device, copy=True)
        if not value.is_floating_point():
            return value
        return (value.double() if double else value).requires_grad_(grad)

    return {name: change(value) for name, value in arguments.items()}


def check_embed(place, arguments, levels=PUBLISHED):
    with flexkernels.backend(place[0]):
        result = flexkernels.fsq_embed(levels=levels, **moved(arguments, place[1])).cpu()
    plain = flexkernels.fsq_embed_ref(levels=levels, **arguments)
    exact = flexkernels.fsq_embed_ref(levels=levels, **moved(arguments, double=True))
    if interpreted(place) and result.dtype == torch.bfloat16:
        torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=1e-6)
    else:
        assert_accurate(result, plain, exact)
    return result


def test_embed_reference_is_dequantize_and_linear():
    arguments = draw_embed(5, 4)
    expected = F.linear(flexkernels.fsq_dequantize(arguments["ids"], PUBLISHED), arguments["weight"], arguments["bias"])
    expected += arguments["positions"][arguments["position_index"].long()]
    for i, token in enumerate(arguments["token_index"].tolist()):
        if token >= 0:
            expected[i] = arguments["tokens"][token]
    torch.testing.assert_close(flexkernels.fsq_embed_ref(levels=PUBLISHED, **arguments), expected)


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", LEVEL_SETS[:4], ids=str)
def test_embed_level_sets_and_dtypes(place, dtype, levels):
    result = check_embed(place, draw_embed(33, 151, levels, dtype), levels)
    assert result.dtype == dtype


@on_every_backend
@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 129), (151, 17), (0, 5)])
def test_embed_odd_sizes_repeat_bit_by_bit(place, rows, width, tables):
    arguments = draw_embed(rows, width, tables=tables)
    assert torch.equal(check_embed(place, arguments), check_embed(place, arguments))


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_embed_whole_packs(place, dtype):
    """Rows of whole packs, with as many dimensions as a kernel keeps weights of, and with fewer."""
    for dims in (1, 3, 4, 5, 6, 8, 9):
        levels = [3] * dims
        check_embed(place, draw_embed(21, 40, levels, dtype), levels)


@on_every_backend
def test_embed_parts(place):
    arguments = draw_embed(9, 20)
    check_embed(place, {k: v for k, v in arguments.items() if k != "bias"})
    check_embed(place, {k: v for k, v in arguments.items() if k not in ("position_index", "tokens", "token_index")})
    check_embed(place, arguments | {"ids": arguments["ids"].int(), "weight": arguments["weight"].t().contiguous().t()})
    replaced = check_embed(place, arguments | {"token_index": torch.full((9,), 2, dtype=torch.int32)})
    assert torch.equal(replaced, arguments["tokens"][2].expand(9, -1))


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_embed_gradients(place, dtype):
    arguments = draw_embed(200, 24, dtype=dtype)
    grad = torch.randn(200, 24).to(dtype)

    def gradients(function, arguments, grad):
        leaves = moved(arguments, grad=True)
        function(levels=PUBLISHED, **leaves).backward(grad)
        return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.requires_grad}

    on_device = moved(arguments, place[1])
    with flexkernels.backend(place[0]):
        found, again = (gradients(flexkernels.fsq_embed, on_device, grad.to(place[1])) for _ in range(2))
    plain = gradients(flexkernels.fsq_embed_ref, arguments, grad)
    exact = gradients(flexkernels.fsq_embed_ref, moved(arguments, double=True), grad.double())
    assert set(found) == {"weight", "bias", "positions", "tokens"}
    for name, value in found.items():
        assert_accurate(value, plain[name], exact[name])
        assert torch.equal(value, again[name])


@on_every_backend
def test_every_id_makes_the_way_there_and_back(place):
    """An identity for weight gives the codes, and the z in the middle of each level gives the id again."""
    if interpreted(place):
        pytest.skip("three dtypes of 64,000 rows are too many for the interpreter")
    ids = torch.arange(64000, device=place[1])
    for dtype in FLOATS:
        with flexkernels.backend(place[0]):
            codes = flexkernels.fsq_embed(ids, PUBLISHED, torch.eye(6, dtype=dtype, device=place[1]))
            assert torch.equal(codes, flexkernels.fsq_dequantize(ids, PUBLISHED, dtype=dtype))
            half, offset, shift = fsq_math.bound_terms(tuple(PUBLISHED), codes)
            levels = torch.tensor([level // 2 for level in PUBLISHED], device=place[1])
            # a code is the value before rounding, so atanh leads back to a z of the same level
            z = (torch.atanh(((codes.float() * levels).round() + offset) / half) - shift).to(dtype)
            for ids_dtype in (torch.int64, torch.int32):
                assert torch.equal(flexkernels.fsq_quantize(z, PUBLISHED, ids_dtype=ids_dtype)[1].long(), ids)


def test_forward_mode():
    arguments = draw_project(9, 20, PUBLISHED)
    tangents = tuple(torch.randn_like(a) for a in arguments)
    run = lambda *a: flexkernels.fsq_project_quantize(*a, PUBLISHED, return_codes=True)[1]  # noqa: E731

    def formula(hidden, weight, bias):
        return fsq_math.smooth(F.linear(F.layer_norm(hidden, (20,)), weight, bias), PUBLISHED)

    codes, found = torch.func.jvp(run, arguments, tangents)
    assert torch.equal(codes, run(*arguments))
    torch.testing.assert_close(found, torch.func.jvp(formula, arguments, tangents)[1], rtol=1e-4, atol=1e-5)
    given = draw_embed(9, 20)
    weight, ids = given["weight"], given["ids"]
    embed = lambda w: flexkernels.fsq_embed(ids, PUBLISHED, w)  # noqa: E731
    out, found = torch.func.jvp(embed, (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(out, embed(weight))
    torch.testing.assert_close(found, embed(torch.ones_like(weight)))


def test_second_derivatives_are_right_or_refused():
    leaves = [a.requires_grad_() for a in draw_project(9, 20, PUBLISHED)]
    grad = torch.randn(9, 6)

    def second(function, leaves):
        first = torch.autograd.grad(function(*leaves), leaves, grad.to(leaves[0]), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def formula(hidden, weight, bias):
        return fsq_math.smooth(F.linear(F.layer_norm(hidden, (20,)), weight, bias), PUBLISHED)

    run = lambda *a: flexkernels.fsq_project_quantize(*a, PUBLISHED, return_codes=True)[1]  # noqa: E731
    exact = second(formula, [a.detach().double().requires_grad_() for a in leaves])
    for found, expected in zip(second(run, leaves), exact, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    given = moved(draw_embed(9, 20), grad=True)
    (first,) = torch.autograd.grad(
        flexkernels.fsq_embed(levels=PUBLISHED, **given).square().sum(), given["weight"], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="fsq_embed_backward has no derivative of this order"):
        torch.autograd.grad(first.sum(), given["weight"])


# tracing


def test_opcheck():
    hidden, weight, bias = (a.to(DEVICE).requires_grad_() for a in draw_project(7, 20, PUBLISHED))
    for codes in (True, False):
        arguments = hidden.detach().requires_grad_(codes), weight, bias, PUBLISHED, 1e-5, codes, torch.int64
        torch.library.opcheck(op.fsq_project_quantize.default, arguments)
    for tables in (True, False):
        given = moved(draw_embed(7, 20, tables=tables), DEVICE, grad=True)
        ids, *rest = (given.get(name) for name in ("ids", "weight", "bias", "positions", "position_index", "tokens"))
        torch.library.opcheck(op.fsq_embed.default, (ids, PUBLISHED, *rest, given.get("token_index")))


def both(hidden, weight, bias, tables):
    ids, codes = flexkernels.fsq_project_quantize(hidden, weight, bias, PUBLISHED, return_codes=True)
    return flexkernels.fsq_embed(ids, PUBLISHED, **tables) + codes.sum()


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compiles_to_one_graph(compiler):
    arguments = [a.to(DEVICE).requires_grad_() for a in draw_project(12, 20, PUBLISHED)]
    tables = moved(draw_embed(12, 20), DEVICE, grad=True)
    del tables["ids"]
    leaves = [*arguments, tables["weight"], tables["positions"], tables["tokens"]]
    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    found, expected = (torch.autograd.grad(f(*arguments, tables).square().sum(), leaves) for f in (compiled, both))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        hidden, weight = torch.empty(5, 8, dtype=torch.float16), torch.empty(6, 8)
        ids, codes = flexkernels.fsq_project_quantize(hidden, weight, None, PUBLISHED, return_codes=True)
        assert (ids.shape, ids.dtype, codes.shape, codes.dtype) == ((5,), torch.int64, (5, 6), torch.float16)
        assert flexkernels.fsq_embed(ids, PUBLISHED, torch.empty(8, 6)).shape == (5, 8)


@needs_gpu
def test_cuda_graph_replays():
    hidden, weight, bias = (a.cuda() for a in draw_project(50, 64, PUBLISHED))
    flexkernels.fsq_project_quantize(hidden, weight, bias, PUBLISHED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = flexkernels.fsq_project_quantize(hidden, weight, bias, PUBLISHED)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    assert torch.equal(ids, flexkernels.fsq_project_quantize(hidden, weight, bias, PUBLISHED))


# wrong input

HIDDEN, WEIGHT = torch.zeros(4, 8), torch.zeros(6, 8)
IDS, INDEX = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
EMBED = {"ids": IDS, "levels": PUBLISHED, "weight": torch.zeros(8, 6)}
WRONG_EMBED = [
    ({"ids": IDS.float()}, TypeError, "ids must be int64 or int32 or uint16, got float32"),
    ({"ids": IDS.view(2, 2)}, ValueError, "ids must have 1 dimensions"),
    ({"weight": WEIGHT}, ValueError, r"weight must have the shape \[6, 6\], got \[6, 8\]"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias must have the shape \[8\], got \[7\]"),
    ({"bias": torch.zeros(8).half()}, TypeError, "bias must be float32, got float16"),
    ({"positions": torch.zeros(3, 8)}, ValueError, "positions must have a row for each id without position_index"),
    ({"positions": torch.zeros(4, 7)}, ValueError, r"positions must have the shape \[4, 8\], got \[4, 7\]"),
    ({"position_index": INDEX}, ValueError, "positions must be given along with position_index, got None"),
    ({"tokens": torch.zeros(2, 8)}, ValueError, "token_index must be given along with tokens, got None"),
    ({"tokens": torch.zeros(2, 8), "token_index": INDEX.long()}, TypeError, "token_index must be int32, got int64"),
    ({"tokens": torch.zeros(2, 8), "token_index": INDEX[:3]}, ValueError, r"token_index must have the shape \[4\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_EMBED)
def test_wrong_embed_input_is_refused(change, error, message):
    for function in (flexkernels.fsq_embed, flexkernels.fsq_embed_ref):
        with pytest.raises(error, match=message):
            function(**EMBED | change)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((HIDDEN[0], WEIGHT, None), ValueError, "hidden must have 2 dimensions"),
        ((HIDDEN.double(), WEIGHT, None), TypeError, "hidden must be float32 or bfloat16 or float16, got float64"),
        ((HIDDEN, WEIGHT[:5], None), ValueError, r"weight must have the shape \[6, 8\], got \[5, 8\]"),
        ((HIDDEN, WEIGHT, torch.zeros(5)), ValueError, r"bias must have the shape \[6\], got \[5\]"),
        ((HIDDEN[:, :0], WEIGHT[:, :0], None), ValueError, "hidden must have a width of at least 1"),
    ],
)
def test_wrong_project_input_is_refused(arguments, error, message):
    for function in (flexkernels.fsq_project_quantize, flexkernels.fsq_project_quantize_ref):
        with pytest.raises(error, match=message):
            function(*arguments, PUBLISHED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS + 64000}, "ids must lie between 0 and 63999, got 64000 to 64000"),
        ({"positions": HIDDEN, "position_index": INDEX - 1}, "position_index must lie below 4, got -1 to -1"),
        ({"tokens": HIDDEN, "token_index": INDEX + 4}, "token_index must lie below 4, got 4 to 4"),
    ],
)
def test_values_out_of_range_are_refused(change, message, monkeypatch):
    monkeypatch.setenv("FLEXKERNELS_CHECK", "1")
    arguments = EMBED | change
    with pytest.raises(ValueError, match=message):
        flexkernels.fsq_embed(arguments.pop("ids").to(DEVICE), arguments.pop("levels"), **moved(arguments, DEVICE))

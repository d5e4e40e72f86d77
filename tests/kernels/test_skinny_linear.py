import pytest
import torch
from helpers import DEVICE, FLOATS, assert_accurate, inductor, interpreted, needs_gpu, on_every_backend
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels

op = torch.ops.flexkernels
SIZES = [(1, 2, 1), (2, 66, 17), (3, 130, 129), (5, 34, 640), (16, 18, 151), (4, 130, 64)]


def draw(m, n, k, dtype, *, int8=False, activation=None, bias=True, residual=True, norm=False):
    """Arguments of skinny_linear on the CPU, every tensor drawn in its own dtype."""
    weight, scale = (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype), None
    if int8:
        weight, scale = flexkernels.quantize_rows(weight)
    rest = {"weight_scale": scale, "activation": activation}
    rest["bias"] = torch.randn(n).to(dtype) if bias else None
    rest["residual"] = torch.randn(m, n // 2 if activation else n).to(dtype) if residual else None
    if norm:
        rest["norm_weight"] = (1 + torch.randn(k) / 8).to(dtype)
    return {"x": torch.randn(m, k).to(dtype), "weight": weight} | rest


def shifted(tensor):
    """A contiguous copy that begins one element behind where memory begins."""
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def convert(arguments, change):
    return {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def linear(place, arguments):
    with flexkernels.backend(place[0]):
        return flexkernels.skinny_linear(**convert(arguments, lambda t: t.to(place[1]))).cpu()


def plain(x, weight, bias, residual, weight_scale, activation, norm_weight=None):
    """The formula as eager code writes it, every step in x's dtype."""
    if norm_weight is not None:
        x = torch.nn.functional.rms_norm(x, norm_weight.shape, norm_weight, 1e-6)
    if weight_scale is not None:
        weight = (weight.float() * weight_scale[:, None]).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if activation:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual


def widen(tensor):
    """float64, but for an int8 weight."""
    return tensor.double() if tensor.is_floating_point() else tensor


def check(place, *several):
    """The error of all cases together: a maximum over few numbers says little."""
    results = [linear(place, arguments) for arguments in several]
    exact = [flexkernels.skinny_linear_ref(**convert(arguments, widen)) for arguments in several]
    formula = [plain(**arguments) for arguments in several]
    assert [r.shape for r in results] == [e.shape for e in exact]
    assert_accurate(*(torch.cat([t.flatten() for t in group]) for group in (results, formula, exact)))


@on_every_backend
@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_accuracy(place, dtype, int8, activation):
    check(place, *(draw(*size, dtype, int8=int8, activation=activation) for size in SIZES))


@on_every_backend
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_number_of_rows(place, bias, residual):
    rows = (1, 16) if interpreted(place) else range(1, 17)
    for dtype in (torch.float32, torch.bfloat16):
        check(place, *(draw(m, 50, 100, dtype, bias=bias, residual=residual) for m in rows))


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_is_the_same_alone_and_among_others(place, dtype, int8):
    arguments = draw(16, 26, 200, dtype, int8=int8, activation="swiglu")
    result = linear(place, arguments)
    assert torch.equal(linear(place, arguments), result)
    if place[0] == "reference":
        pytest.skip("torch promises no such thing")
    # the interpreter multiplies with NumPy, whose BLAS may sum a row in an order that depends on its place
    tolerance = 1e-6 if interpreted(place) and dtype == torch.float32 else 0
    for rows in (slice(0, 1), slice(15, 16), slice(3, 10)):
        cut = arguments | {name: arguments[name][rows] for name in ("x", "residual")}
        torch.testing.assert_close(linear(place, cut), result[rows], rtol=tolerance, atol=tolerance)


@on_every_backend
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_empty_and_strided_inputs(place, activation):
    empty = (draw(*size, torch.float32, activation=activation) for size in ((0, 6, 5), (3, 0, 5), (3, 6, 0)))
    check(place, *empty, draw(3, 6, 0, torch.float32, int8=True, activation=activation))
    check(place, draw(3, 6, 0, torch.half, activation=activation))
    arguments = draw(4, 12, 33, torch.bfloat16, activation=activation)
    expected = linear(place, arguments)
    apart = {"x": torch.randn(4, 3, 33).to(torch.bfloat16)[:, 1], "weight": arguments["weight"].t().contiguous().t()}
    apart["x"].copy_(arguments["x"])
    wide = torch.zeros(4, 50, dtype=torch.bfloat16)
    apart["residual"] = wide[:, 7 : 7 + expected.shape[1]].copy_(arguments["residual"])
    assert torch.equal(linear(place, arguments | apart), expected)
    # columns apart: rows are copied
    columns = arguments["x"].t().contiguous().t()
    assert torch.equal(linear(place, arguments | {"x": columns}), expected)


@on_every_backend
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_alignment_changes_no_bits(place, dtype, int8):
    """Rows that begin anywhere, against copies that begin on 16 bytes."""
    if place[0] in ("reference", "triton"):
        pytest.skip("torch and Triton promise no such thing")
    for m, k in ((3, 160), (9, 1056)):
        arguments = draw(m, 18, k, dtype, int8=int8)
        expected = linear(place, arguments)
        moved = convert(arguments, lambda t: t.to(place[1]))
        apart = torch.nn.functional.pad(moved["x"], (0, 3))[:, :k]
        for change in ({"x": shifted(moved["x"])}, {"x": apart}, {"weight": shifted(moved["weight"])}):
            with flexkernels.backend(place[0]):
                assert torch.equal(flexkernels.skinny_linear(**moved | change).cpu(), expected)


@on_every_backend
@pytest.mark.parametrize("int8", [False, True])
def test_long_rows_and_many_tiles(place, int8):
    if interpreted(place):
        pytest.skip("slow in the interpreter")
    for dtype in FLOATS:
        check(place, draw(9, 38, 2064, dtype, int8=int8, activation="swiglu"), draw(2, 700, 24, dtype, int8=int8))


@on_every_backend
def test_large_weights_are_split_over_threads(place):
    if interpreted(place):
        pytest.skip("slow in the interpreter")
    for dtype in FLOATS:
        check(place, draw(2, 3001, 600, dtype))


# the norm

# on a GPU the linear layer norms rows of whole packs of up to 1,024 elements itself
NORMED = [(1, 18, 64), (3, 10, 33), (9, 18, 160), (16, 6, 1024), (2, 4, 1800)]


@on_every_backend
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_accuracy_with_a_norm(place, dtype, int8):
    sizes = NORMED[:3] if interpreted(place) else NORMED
    for activation in (None, "swiglu"):
        check(place, *(draw(*size, dtype, int8=int8, activation=activation, norm=True) for size in sizes))


@on_every_backend
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_norm_gives_the_bits_of_the_two_ops(place, dtype, int8):
    if place[0] not in ("cpu", "cuda"):
        pytest.skip("torch and Triton promise no such thing")
    for m, n, k in NORMED:
        arguments = convert(draw(m, n, k, dtype, int8=int8, activation="swiglu", norm=True), lambda t: t.to(place[1]))
        x, weight = arguments["x"], arguments["norm_weight"]
        apart = torch.nn.functional.pad(x, (0, 3))[:, :k]
        others = ({"x": other} for other in (apart, apart.t().contiguous().t(), shifted(x)))
        with flexkernels.backend(place[0]):
            for changes in ([{}, *others, {"norm_weight": shifted(weight)}], [{"norm_weight": weight.float()}]):
                normed = flexkernels.rms_norm(x, changes[0].get("norm_weight", weight), eps=1e-2)
                expected = flexkernels.skinny_linear(**arguments | {"x": normed, "norm_weight": None})
                for change in changes:
                    assert torch.equal(flexkernels.skinny_linear(**arguments | change, norm_eps=1e-2), expected)


@on_every_backend
def test_a_row_without_a_norm_spoils_no_other(place):
    arguments = draw(3, 10, 64, torch.bfloat16, norm=True) | {"norm_eps": 0.0}
    expected = linear(place, arguments)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][1] = 0
    result = linear(place, arguments)
    assert result[1].isnan().all() and torch.equal(result[::2], expected[::2])


@on_every_backend
def test_a_norm_of_nothing(place):
    check(place, *(draw(*size, torch.bfloat16, norm=True) for size in ((0, 6, 8), (3, 0, 8), (3, 6, 0))))


# int8


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_rows_error_is_at_most_half_a_step(dtype):
    weight = (torch.randn(40, 129) * torch.logspace(-4, 4, 40)[:, None]).to(dtype)
    weight[7] = 0
    quantized, scale = flexkernels.quantize_rows(weight)
    assert (quantized.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert quantized.abs().max() == 127 and scale[7] == 0 and not quantized[7].any()
    error = (quantized.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()
    # the largest value of a row is met but for rounding
    assert error.gather(1, weight.float().abs().argmax(1)[:, None]).max() <= 1e-6 * weight.abs().max()


def test_quantize_rows_of_tiny_and_no_values():
    quantized, scale = flexkernels.quantize_rows(torch.full((2, 3), 1e-44))
    assert not quantized.any() and not scale.any()
    assert [t.shape for t in flexkernels.quantize_rows(torch.zeros(4, 0))] == [(4, 0), (4,)]
    with pytest.raises(ValueError, match="weight must be finite, got inf or NaN"):
        flexkernels.quantize_rows(torch.tensor([[1.0, float("nan")]]))


# dispatch, tracing


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck(int8):
    a = convert(draw(3, 10, 20, torch.float32, int8=int8, activation="swiglu"), lambda t: t.to(DEVICE))
    arguments = (a["x"], a["weight"], a["weight_scale"], a["bias"], a["residual"], True)
    torch.library.opcheck(op.skinny_linear.default, arguments)
    norm = torch.ones(20, device=DEVICE)
    torch.library.opcheck(op.skinny_linear.default, (*arguments, norm, 1e-3))


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compiles_to_one_graph(compiler):
    arguments = convert(draw(3, 10, 20, torch.float32, norm=True), lambda t: t.to(DEVICE))
    compiled = torch.compile(flexkernels.skinny_linear, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(**arguments), flexkernels.skinny_linear(**arguments))


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        x, weight = torch.empty(3, 9, dtype=torch.half), torch.empty(8, 9, dtype=torch.half)
        out = flexkernels.skinny_linear(x, weight, activation="swiglu", norm_weight=torch.empty(9))
    assert (out.shape, out.dtype) == ((3, 4), torch.half)


def test_a_gradient_is_refused():
    x, weight = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="skinny_linear has no gradient"):
        flexkernels.skinny_linear(x, weight)
    with torch.no_grad():
        assert not flexkernels.skinny_linear(x, weight).requires_grad


@needs_gpu
def test_cuda_graph_replays():
    arguments = convert(draw(2, 64, 128, torch.bfloat16), lambda t: t.cuda())
    flexkernels.skinny_linear(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flexkernels.skinny_linear(**arguments)
    arguments["x"].normal_()
    graph.replay()
    assert torch.equal(out, flexkernels.skinny_linear(**arguments))


# wrong input

X, WEIGHT = torch.zeros(2, 8), torch.zeros(6, 8)
WRONG = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be float32 or bfloat16 or float16.*got int64"),
    ({"x": X[0]}, ValueError, r"x must have 2 dimensions, got shape \[8\]"),
    ({"x": torch.zeros(17, 8)}, ValueError, "x must have at most 16 rows, got 17"),
    ({"weight": WEIGHT.half()}, TypeError, "weight must be float32 or int8, got float16"),
    ({"weight": WEIGHT[:, :7]}, ValueError, r"weight must have the shape \[6, 8\], got \[6, 7\]"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like x, got meta"),
    ({"weight": WEIGHT.to(torch.int8)}, TypeError, "weight_scale must be a torch.Tensor, got NoneType"),
    ({"weight_scale": torch.ones(6)}, ValueError, "weight_scale must be None unless weight is int8, got a tensor"),
    ({"activation": "gelu"}, ValueError, "activation must be None or \"swiglu\", got 'gelu'"),
    ({"weight": WEIGHT[:5], "activation": "swiglu"}, ValueError, "weight must have an even number of rows.*got 5"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have the shape \[6\], got \[5\]"),
    ({"bias": torch.zeros(6).half()}, TypeError, "bias must be float32, got float16"),
    ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight must have the shape \[8\], got \[7\]"),
    ({"norm_weight": torch.zeros(8).half()}, TypeError, "norm_weight must be float32, got float16"),
    ({"norm_weight": torch.zeros(8, device="meta")}, ValueError, "norm_weight must be on cpu like x, got meta"),
    ({"norm_weight": torch.zeros(8), "norm_eps": -1.0}, ValueError, "norm_eps must be at least 0, got -1.0"),
    ({"norm_weight": torch.zeros(8), "norm_eps": float("nan")}, ValueError, "norm_eps must be finite, got nan"),
    ({"residual": torch.zeros(2, 6), "activation": "swiglu"}, ValueError, r"residual must have the shape \[2, 3\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    for function in (flexkernels.skinny_linear, flexkernels.skinny_linear_ref):
        with pytest.raises(error, match=message):
            function(**{"x": X, "weight": WEIGHT} | change)

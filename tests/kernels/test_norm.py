import math

import pytest
import torch
from helpers import DEVICE, FLOATS, assert_accurate, inductor, interpreted, needs_gpu, on_cuda, on_every_backend
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import norm, norm_math

op = torch.ops.flexkernels
EPS = {"adaln_norm": 1e-5, "gated_residual_adaln_norm": 1e-5, "rms_norm": 1e-6}
TABLES = {
    "adaln_norm": ("shift", "scale"),
    "gated_residual_adaln_norm": ("gate", "shift", "scale"),
    "gated_residual": ("gate",),
}
NAMES = (*TABLES, "rms_norm", "swiglu")
PATTERNS = ("sorted", "interleaved", "single")
every_op = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def draw_segment(n, rows, pattern):
    if pattern == "sorted":
        # uneven, and the last segment has no rows where there are several
        return (torch.arange(n) ** 2 * max(1, rows - 1) // max(1, n * n)).int()
    return torch.zeros(n, dtype=torch.int32) if pattern == "single" else (torch.arange(n) * 7 % rows).int()


def draw(name, n=17, d=40, dtype=torch.float32, table_dtype=None, rows=3, pattern="interleaved", residual=True):
    """Arguments of an op on the CPU, every tensor drawn in its own dtype; the tables are views of a wider one."""
    table_dtype = table_dtype or dtype
    if name == "swiglu":
        return {"x": (3 * torch.randn(n, 2 * d)).to(dtype)}
    arguments = {"x": (torch.randn(n, d) + 0.5).to(dtype)}
    if name == "rms_norm":
        extra = {"residual": torch.randn(n, d).to(dtype)} if residual else {}
        return arguments | {"weight": (1 + 0.3 * torch.randn(d)).to(table_dtype)} | extra
    if "residual" in name:
        arguments["y"] = torch.randn(n, d).to(dtype)
    table = (0.5 * torch.randn(rows, 6 * d)).to(table_dtype)
    for i, key in enumerate(TABLES[name]):
        arguments[key] = table[:, 2 * i * d : (2 * i + 1) * d]
    return arguments | {"segment": draw_segment(n, rows, pattern)}


def convert(arguments, device=None, double=False, grad=False):
    """Arguments elsewhere or in another dtype, with the strides they have."""

    def change(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().to(device or value.device)
        if not value.is_floating_point():
            return value
        return (value.double() if double else value).requires_grad_(grad)

    return {key: change(value) for key, value in arguments.items()}


def tuple_of(results):
    return results if isinstance(results, tuple) else (results,)


def call(place, name, arguments):
    with flexkernels.backend(place[0]):
        results = getattr(flexkernels, name)(**convert(arguments, place[1]))
    return [result.cpu() for result in tuple_of(results)]


def reference(name, arguments):
    return tuple_of(getattr(flexkernels, f"{name}_ref")(**arguments))


def close(place, result, plain, exact, terms=0.0):
    if interpreted(place) and result.dtype == torch.bfloat16:
        # the interpreter cuts bfloat16 off instead of rounding
        torch.testing.assert_close(result.double(), exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max()))
    else:
        assert_accurate(result, plain, exact, terms)


def check(place, name, arguments):
    results = call(place, name, arguments)
    plain, exact = reference(name, arguments), reference(name, convert(arguments, double=True))
    for result, rounded, true in zip(results, plain, exact, strict=True):
        assert result.is_contiguous()
        close(place, result, rounded, true)
    return results


def test_reference_is_the_formula():
    """Against torch's own norms and activations, with the tables expanded to rows."""
    a = convert(draw("gated_residual_adaln_norm"), double=True)
    index = a["segment"].long()
    x_new = a["x"] + a["gate"][index] * a["y"]
    normed = torch.nn.functional.layer_norm(x_new, (40,)) * (1 + a["scale"][index]) + a["shift"][index]
    results = flexkernels.gated_residual_adaln_norm_ref(**a)
    torch.testing.assert_close(results[0], x_new)
    torch.testing.assert_close(results[1], normed)
    torch.testing.assert_close(flexkernels.adaln_norm_ref(x_new, a["shift"], a["scale"], a["segment"]), normed)
    torch.testing.assert_close(flexkernels.gated_residual_ref(a["x"], a["y"], a["gate"], a["segment"]), x_new)
    torch.testing.assert_close(flexkernels.adaln_norm_ref(x_new), torch.nn.functional.layer_norm(x_new, (40,)))
    a = convert(draw("rms_norm"), double=True)
    both = a["x"] + a["residual"]
    results = flexkernels.rms_norm_ref(**a)
    torch.testing.assert_close(results[0], both)
    torch.testing.assert_close(results[1], torch.nn.functional.rms_norm(both, (40,), a["weight"], 1e-6))
    x = draw("swiglu")["x"].double()
    torch.testing.assert_close(flexkernels.swiglu_ref(x), torch.nn.functional.silu(x[:, :40]) * x[:, 40:])


@on_every_backend
@every_op
@every_dtype
@pytest.mark.parametrize("wide_table", [False, True])
def test_accuracy(place, name, dtype, wide_table):
    check(place, name, draw(name, 37, 384, dtype, torch.float32 if wide_table else dtype))


@on_every_backend
@every_op
@pytest.mark.parametrize(("n", "d"), [(1, 1), (151, 17), (3, 1), (3, 1792), (1, 129)])
def test_odd_sizes(place, name, n, d):
    check(place, name, draw(name, n, d, torch.bfloat16))


@on_every_backend
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_segment_patterns(place, name, pattern):
    for rows in (1, 5):
        check(place, name, draw(name, 33, 24, pattern=pattern, rows=rows))


@on_every_backend
@every_op
def test_empty_input(place, name):
    for arguments in (draw(name, 0, 16), draw(name, 4, 0)):
        results = call(place, name, convert(arguments, grad=True))
        assert all(torch.equal(r, e) for r, e in zip(results, reference(name, arguments), strict=True))
    leaves = convert(draw(name, 0, 16), place[1], grad=True)
    with flexkernels.backend(place[0]):
        sum(r.sum() for r in tuple_of(getattr(flexkernels, name)(**leaves))).backward()
    for leaf in leaves.values():
        assert not leaf.requires_grad or (leaf.grad == 0).all()


@on_every_backend
def test_every_table_may_be_absent(place):
    arguments = draw("gated_residual_adaln_norm", 9, 31)
    for shift in (False, True):
        for scale in (False, True):
            for gate in (False, True):
                given = {"gate": gate, "shift": shift, "scale": scale}
                some = {k: v for k, v in arguments.items() if given.get(k, True)}
                if not (shift or scale or gate):
                    del some["segment"]
                check(place, "gated_residual_adaln_norm", some)
                some = {k: v for k, v in some.items() if k not in ("gate", "y")}
                if not (shift or scale):
                    some.pop("segment", None)
                check(place, "adaln_norm", some)
    check(place, "rms_norm", draw("rms_norm", 9, 31, residual=False))


@on_every_backend
@every_op
def test_strided_inputs_and_one_row_tables(place, name):
    """Rows further apart than they are long, columns out of order, and tables of one row without a segment."""
    arguments = draw(name, 11, 30, rows=1)
    arguments.pop("segment", None)
    check(place, name, arguments)
    for key in ("x", "y", "residual"):
        if key in arguments:
            arguments[key] = torch.cat([arguments[key], arguments[key]], 1)[:, : arguments[key].shape[1]]
    check(place, name, arguments)
    swapped = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in arguments.items()}
    assert not swapped["x"].is_contiguous()
    check(place, name, swapped)
    expanded = arguments | {"x": arguments["x"][:1].expand(11, -1)}
    check(place, name, expanded)


@on_every_backend
def test_tables_of_two_dtypes(place):
    arguments = draw("gated_residual_adaln_norm", 9, 24, torch.bfloat16)
    check(place, "gated_residual_adaln_norm", arguments | {"gate": arguments["gate"].float()})


@on_every_backend
def test_statistics_survive_a_large_mean(place):
    """The mean of squares less the squared mean would lose everything here."""
    x = 1000 + torch.randn(5, 300)
    check(place, "adaln_norm", {"x": x})
    constant = torch.full((2, 64), 3.0)
    assert (call(place, "adaln_norm", {"x": constant})[0] == 0).all()
    assert (call(place, "rms_norm", {"x": torch.zeros(2, 64), "weight": torch.ones(64)})[0] == 0).all()


@on_every_backend
def test_normed_follows_from_the_rounded_sum(place):
    arguments = draw("gated_residual_adaln_norm", 33, 129, torch.bfloat16)
    x_new, normed = call(place, "gated_residual_adaln_norm", arguments)
    tables = {k: arguments[k] for k in ("shift", "scale", "segment")}
    assert torch.equal(normed, call(place, "adaln_norm", {"x": x_new} | tables)[0])
    assert torch.equal(
        x_new, call(place, "gated_residual", {k: arguments[k] for k in ("x", "y", "gate", "segment")})[0]
    )


@on_every_backend
def test_swiglu_over_the_whole_range(place):
    a = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, -88.5, -103.9, 1e30, -1e30])])
    x = torch.cat([a, torch.ones_like(a)])[None]
    result = call(place, "swiglu", {"x": x})[0].view(-1).double()
    exact = reference("swiglu", {"x": x.double()})[0].view(-1)
    assert torch.isfinite(result).all()
    assert ((result - exact).abs() <= 2**-21 * exact.abs() + 1e-36).all()
    special = torch.tensor([[math.nan, 1.0], [math.inf, 2.0], [1.0, math.nan]])
    result = call(place, "swiglu", {"x": special})[0].view(-1)
    assert result[0].isnan() and result[1] == math.inf and result[2].isnan()


@on_every_backend
@every_op
def test_a_nan_stays_in_its_row(place, name):
    arguments = draw(name, 9, 40)
    arguments["x"][4, 3] = math.nan
    for result in call(place, name, arguments):
        assert result[4].isnan().any() and torch.isfinite(result[torch.arange(9) != 4]).all()


@on_every_backend
@every_op
def test_runs_repeat_bit_by_bit_and_rows_stand_alone(place, name):
    arguments = draw(name, 21, 129, torch.bfloat16)
    first, second = call(place, name, arguments), call(place, name, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = {k: v[5:7] if k in ("x", "y", "residual", "segment") else v for k, v in arguments.items()}
    if place[0] != "reference":
        for whole, part in zip(first, call(place, name, rows), strict=True):
            assert torch.equal(whole[5:7], part)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1792, 1784])
def test_rows_stored_past_the_caches_are_the_same(dtype, d):
    n = 40 * 2**20 // (4 * d * dtype.itemsize)
    arguments = draw("gated_residual_adaln_norm", n, d, dtype, pattern="sorted")
    whole = call(("cpu", "cpu"), "gated_residual_adaln_norm", arguments)
    for begin in range(0, n, 500):
        rows = {k: v[begin : begin + 500] if k in ("x", "y", "segment") else v for k, v in arguments.items()}
        for all_rows, some in zip(whole, call(("cpu", "cpu"), "gated_residual_adaln_norm", rows), strict=True):
            assert torch.equal(all_rows[begin : begin + 500], some)


# gradients


def gradients(function, arguments, which=None):
    """Gradients of a weighted sum of the results, or of result number `which` alone."""
    leaves = convert(arguments, grad=True)
    results = tuple_of(function(**leaves))
    results = results if which is None else results[which : which + 1]
    loss = 0
    for i, result in enumerate(results):
        weights = torch.linspace(-1 - i, 1.5, result.numel(), device=result.device, dtype=torch.float64)
        loss = loss + (result.double() * weights.sin().view(result.shape)).sum()
    loss.backward()
    return {k: leaf.grad for k, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad}


def check_gradients(place, name, arguments, which=None, terms=0.0):
    with flexkernels.backend(place[0]):
        found = gradients(getattr(flexkernels, name), convert(arguments, place[1]), which)
    formula = getattr(flexkernels, f"{name}_ref")
    plain = gradients(formula, arguments, which)
    exact = gradients(formula, convert(arguments, double=True), which)
    for key, grad in exact.items():
        if grad is None:
            assert found[key] is None or (found[key] == 0).all(), key
        else:
            close(place, found[key], plain[key], grad, terms)
    return found


@on_every_backend
@every_op
@every_dtype
def test_gradients(place, name, dtype):
    check_gradients(place, name, draw(name, 37, 72, dtype))


@on_every_backend
@every_op
@pytest.mark.parametrize(("n", "d"), [(1, 1), (17, 17), (151, 17), (2, 1792)])
def test_gradients_of_odd_sizes(place, name, n, d):
    # a row of one element is its own mean: 1 / sqrt(eps) times what cancels, exactly or up to rounding
    terms = 1e-5**-0.5 if d == 1 and "adaln" in name else 0.0
    check_gradients(place, name, draw(name, n, d), terms=terms)


@on_every_backend
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_segment_patterns(place, name, pattern):
    """More rows than one block of the sums, segments that cross blocks, and segments without rows."""
    for rows in (3, 70):
        check_gradients(place, name, draw(name, 77, 17, pattern=pattern, rows=rows))


@on_cuda
@pytest.mark.parametrize("name", ["gated_residual_adaln_norm", "adaln_norm", "rms_norm"])
@pytest.mark.parametrize("d", [8, 272])
def test_gradients_of_blocks_that_walk_many_rows(place, name, d):
    """Runs of six rows, which change their segment within a run; a row of one lane, and of two warps."""
    check_gradients(place, name, draw(name, 1500, d, torch.bfloat16, rows=5, pattern="sorted"))


def backward_of(place, wanted, segment, rows, order, dtype=torch.bfloat16):
    """norm_backward of drawn tensors by the op itself, with `order` or None: what it finds then."""
    torch.manual_seed(1)
    n = len(segment)
    grad_out, grad_sum, v, y = torch.randn(4, n, 8).to(dtype).to(place[1])
    gate, scale = torch.randn(2, rows, 8).to(dtype).to(place[1])
    places = [None if t is None else t.to(place[1]) for t in order or (None, None)]
    with flexkernels.backend(place[0]):
        tensors = (grad_out, grad_sum, v, y, gate, scale, segment.to(place[1]), *places)
        return norm._norm_backward_op(*tensors, rows, 1e-5, False, wanted)


@on_cuda
@pytest.mark.parametrize(
    ("n", "rows", "pattern"),
    [(1, 3, "single"), (70, 70, "interleaved"), (70, 300, "sorted"), (1500, 5, "interleaved"), (1500, 2, "sorted")],
)
def test_the_order_is_found_where_it_is_not_given(place, n, rows, pattern):
    """As in a capture, where the host must not look; segments out of range count as the nearest."""
    segment = draw_segment(n, rows, pattern)
    if pattern == "interleaved":
        segment[3], segment[n // 2] = -5, 10**6
    given = backward_of(place, 15, segment, rows, norm_math._find_order(segment, rows))
    found = backward_of(place, 15, segment, rows, None)
    assert all(torch.equal(a, b) for a, b in zip(given, found, strict=True))


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_narrow_sums_are_the_wide_ones_rounded(place, dtype):
    segment = draw_segment(37, 3, "interleaved")
    order = norm_math._find_order(segment, 3)
    wide = backward_of(place, 15, segment, 3, order, dtype)
    narrow = backward_of(place, 15 | norm_math.NARROW_SUMS, segment, 3, order, dtype)
    for i, (a, b) in enumerate(zip(wide, narrow, strict=True)):
        assert a.dtype == (dtype if i < 2 else torch.float32) and b.dtype == dtype
        if interpreted(place) and dtype == torch.bfloat16:
            # the interpreter cuts bfloat16 off instead of rounding
            torch.testing.assert_close(b.float(), a.float(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(a.to(dtype), b)


@on_every_backend
@pytest.mark.parametrize("name", ["gated_residual_adaln_norm", "rms_norm"])
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_one_result(place, name, which):
    check_gradients(place, name, draw(name, 9, 24), which)


@on_every_backend
def test_gradients_where_tables_are_absent_or_differ_in_dtype(place):
    arguments = draw("gated_residual_adaln_norm", 37, 72)
    for absent in (("gate",), ("shift",), ("scale",), ("shift", "scale"), ("gate", "shift", "scale", "segment")):
        check_gradients(place, "gated_residual_adaln_norm", {k: v for k, v in arguments.items() if k not in absent})
    check_gradients(place, "adaln_norm", {"x": arguments["x"]})
    check_gradients(place, "rms_norm", draw("rms_norm", 37, 72, residual=False))
    check_gradients(place, "rms_norm", draw("rms_norm", 37, 72, torch.bfloat16, torch.float32))
    mixed = draw("gated_residual_adaln_norm", 37, 72, torch.bfloat16)
    found = check_gradients(place, "gated_residual_adaln_norm", mixed | {"gate": mixed["gate"].float()})
    assert found["gate"].dtype == torch.float32 and found["scale"].dtype == torch.bfloat16


@on_every_backend
@pytest.mark.parametrize("name", [*TABLES, "rms_norm"])
def test_gradients_repeat_bit_by_bit(place, name):
    arguments = convert(draw(name, 77, 33), place[1])
    with flexkernels.backend(place[0]):
        first, second = (gradients(getattr(flexkernels, name), arguments) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_op
def test_reference_passes_gradcheck(name):
    arguments = convert(draw(name, 4, 5, rows=2), double=True)
    keys = [key for key, value in arguments.items() if value.is_floating_point()]
    leaves = [arguments[key].detach().clone().requires_grad_() for key in keys]

    def function(*values):
        return getattr(flexkernels, f"{name}_ref")(**arguments | dict(zip(keys, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)


def test_one_tensor_passed_twice_gets_both_gradients():
    x = torch.randn(3, 8, requires_grad=True)
    flexkernels.gated_residual(x, x, torch.full((1, 8), 2.0)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))
    x.grad = None
    flexkernels.gated_residual_adaln_norm(x, x)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """Frozen tables cost no sums over segments."""
    wanted = []
    op = norm._norm_backward_op
    monkeypatch.setattr(norm, "_norm_backward_op", lambda *args: wanted.append(args[-1]) or op(*args))
    arguments = draw("adaln_norm")
    arguments["x"].requires_grad_()
    flexkernels.adaln_norm(**arguments).sum().backward()
    assert wanted == [0]


# dispatch, tracing


@every_op
def test_opcheck(name):
    arguments = convert(draw(name, 5, 8), DEVICE, grad=True)
    eps = [] if name in ("gated_residual", "swiglu") else [EPS[name]]
    torch.library.opcheck(getattr(op, name).default, (*arguments.values(), *eps))
    plain = arguments["x"].detach()
    if name == "swiglu":
        torch.library.opcheck(op.swiglu_backward.default, (plain[:, :8].contiguous(), plain))
    elif name != "rms_norm":
        rest = [arguments.get(key) for key in ("gate", "scale")]
        rest = [None if table is None else table.detach() for table in rest]
        order, offsets = norm_math.segment_order(arguments["segment"], 3)
        rest += [arguments["segment"], order, offsets, 3, 1e-5, False, 12]
        torch.library.opcheck(op.norm_backward.default, (plain, plain, plain, plain, *rest))


@every_op
@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compiles_to_one_graph(compiler, name):
    if compiler == "inductor" and name != "gated_residual_adaln_norm":
        pytest.skip("one op is enough for the slow compiler")
    arguments = convert(draw(name, 6, 16), DEVICE)
    function = getattr(flexkernels, name)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    results = tuple_of(compiled(**arguments))
    assert all(torch.equal(a, b) for a, b in zip(results, tuple_of(function(**arguments)), strict=True))
    traced, eager = gradients(compiled, arguments), gradients(function, arguments)
    assert all(torch.equal(traced[key], eager[key]) for key in eager)


@every_op
def test_fake_tensors(name):
    arguments = draw(name, 6, 16, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in arguments.items()}
        results = tuple_of(getattr(flexkernels, name)(**fake))
    expected = reference(name, arguments)
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]


@needs_gpu
def test_cuda_graph_replays():
    arguments = convert(draw("gated_residual_adaln_norm", 64, 384, torch.bfloat16), "cuda")
    expected = flexkernels.gated_residual_adaln_norm(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flexkernels.gated_residual_adaln_norm(**arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# wrong input

X, TABLE, SEGMENT = torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(4, dtype=torch.int32)
WRONG = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be float32 or bfloat16 or float16.*got int64"),
    ({"x": X[0]}, ValueError, r"x must have 2 dimensions, got shape \[8\]"),
    ({"y": X[:2]}, ValueError, r"y must have the shape \[4, 8\] of x, got \[2, 8\]"),
    ({"y": X.half()}, TypeError, "y must be float32, got float16"),
    ({"gate": TABLE.half()}, TypeError, "gate must be float32, got float16"),
    ({"shift": TABLE[:, :4]}, ValueError, r"shift must have the shape \[2, 8\]( of gate)?, got \[2, 4\]"),
    ({"scale": torch.zeros(3, 8)}, ValueError, r"scale must have the shape \[2, 8\] of gate, got \[3, 8\]"),
    ({"scale": TABLE.to("meta")}, ValueError, "scale must be on cpu like x, got meta"),
    ({"segment": None}, ValueError, "segment must be given with tables of 2 rows, got None"),
    ({"segment": SEGMENT.long()}, TypeError, "segment must be int32, got int64"),
    ({"segment": SEGMENT[:3]}, ValueError, r"segment must have the shape \[4\], got \[3\]"),
    (
        {"gate": TABLE[:0], "shift": TABLE[:0], "scale": TABLE[:0]},
        ValueError,
        "gate must have at least one row, got 0",
    ),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    given = {"x": X, "y": X, "gate": TABLE, "shift": TABLE, "scale": TABLE, "segment": SEGMENT} | change
    for function in (flexkernels.gated_residual_adaln_norm, flexkernels.gated_residual_adaln_norm_ref):
        with pytest.raises(error, match=message):
            function(**given)


@pytest.mark.parametrize(
    ("function", "args", "error", "message"),
    [
        ("gated_residual", (X, X, None), TypeError, "gate must be a torch.Tensor, got NoneType"),
        ("rms_norm", (X, X), ValueError, r"weight must have 1 dimensions, got shape \[4, 8\]"),
        ("rms_norm", (X, X[0, :4]), ValueError, r"weight must have the shape \[8\], got \[4\]"),
        ("rms_norm", (X, X[0].half()), TypeError, "weight must be float32, got float16"),
        ("swiglu", (X[:, :7],), ValueError, r"x must have the shape \[n, 2 \* h\], got \[4, 7\]"),
        ("swiglu", (X.int(),), TypeError, "x must be float32 or bfloat16 or float16.*got int32"),
    ],
)
def test_wrong_input_of_the_other_ops_is_refused(function, args, error, message):
    for name in (function, f"{function}_ref"):
        with pytest.raises(error, match=message):
            getattr(flexkernels, name)(*args)


def test_float64_is_for_the_reference_alone():
    with pytest.raises(TypeError, match="x must be float32 or bfloat16 or float16, got float64"):
        flexkernels.adaln_norm(X.double())


@on_every_backend
@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
def test_a_segment_out_of_range_is_refused_on_the_cpu(place, value):
    if place[0] == "cuda" or place[1] != "cpu":
        pytest.skip("looking at segments would wait for the GPU")
    segment = torch.tensor([0, 1, value, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"segment must lie between 0 and 1, got {value}"):
        call(place, "adaln_norm", {"x": X, "shift": TABLE, "segment": segment})


@on_every_backend
def test_rows_wider_than_a_block(place):
    arguments = draw("gated_residual_adaln_norm", 2, norm.MAX_WIDTH + 1)
    if place[0] == "triton":
        with pytest.raises(RuntimeError, match="rows of 8193 elements are longer than 8192"):
            call(place, "gated_residual_adaln_norm", arguments)
    else:
        check(place, "gated_residual_adaln_norm", arguments)
        check_gradients(place, "gated_residual_adaln_norm", arguments)


@on_every_backend
@every_op
@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [
        *((3, 1000, torch.float32), (2, 2304, torch.bfloat16), (2, 4100, torch.float32), (300, 24, torch.float16)),
        (1, 16384, torch.bfloat16),
    ],
)
def test_every_way_through_a_row(place, name, n, d, dtype):
    """Several warps a row, more than a block keeps in registers, runs of several rows in the sums of a backward."""
    if interpreted(place) and d > 1000:
        pytest.skip("slow in the interpreter, which takes every width the same way")
    if place[0] == "triton" and name != "swiglu" and d > norm.MAX_WIDTH:
        pytest.skip("Triton refuses it, as test_rows_wider_than_a_block sees")
    arguments = draw(name, n, d, dtype)
    check(place, name, arguments)
    check_gradients(place, name, arguments)


@on_every_backend
def test_swiglu_of_wide_odd_rows(place):
    """Halves that are no whole pairs of 16 bits."""
    if interpreted(place):
        pytest.skip("slow in the interpreter, which takes every width the same way")
    arguments = draw("swiglu", 2, 16383, torch.bfloat16)
    check(place, "swiglu", arguments)
    check_gradients(place, "swiglu", arguments)


@on_every_backend
@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_a_row_lies_does_not_change_its_bits(place, name, dtype):
    arguments = draw(name, 5, 64, dtype)
    moved = {k: torch.cat([v[:, :1], v], 1)[:, 1:] if v.dim() == 2 else v for k, v in arguments.items()}
    for one, other in zip(call(place, name, arguments), call(place, name, moved), strict=True):
        assert torch.equal(one, other)


def test_the_order_of_segments_is_found_once_for_each_packing(monkeypatch):
    found = []
    find = norm_math._find_order
    monkeypatch.setattr(norm_math, "_find_order", lambda *args: found.append(1) or find(*args))
    segment, x = torch.tensor([1, 0, 1], dtype=torch.int32), torch.randn(3, 4)
    table = torch.randn(2, 4, requires_grad=True)

    def gradient():
        return torch.autograd.grad(flexkernels.adaln_norm(x, shift=table, segment=segment).sum(), table)[0]

    assert torch.equal(gradient(), torch.tensor([[1.0], [2.0]]).expand(2, 4))
    gradient()
    assert len(found) == 1
    segment[1] = 1
    assert torch.equal(gradient(), torch.tensor([[0.0], [3.0]]).expand(2, 4))
    assert len(found) == 2

"""flow_update beyond Euler's step (test_flow_step.py): several states, past velocities, in place, rescale."""

from dataclasses import replace

import pytest
import torch
from flow_cases import convert, draw, draw_ragged, every_guidance, gradients
from helpers import DEVICE, FLOATS, assert_accurate, called_ops, inductor, interpreted, on_every_backend
from torch._dynamo.testing import CompileCounterWithBackend

import flexkernels
from flexkernels import CFG, Prefix, solvers


def with_terms(arguments, states=3, past=2, **settings):
    """Arguments of flow_step made into those of flow_update."""
    x, dt = arguments.pop("x"), arguments.pop("dt")
    others = [torch.randn(x.shape).to(x.dtype) for _ in range(states - 1)]
    weights = [0.75, -0.5, 0.25]
    terms = {"x": [x, *others], "a": weights[:states], "b": dt}
    terms |= {"past": [torch.randn(x.shape) for _ in range(past)], "past_b": weights[:past], "return_velocity": True}
    return arguments | terms | settings


def update(place, arguments, function=flexkernels.flow_update):
    with flexkernels.backend(place[0]):
        results = function(**convert(arguments, device=place[1]))
    return [None if result is None else result.cpu() for result in results]


def check(place, arguments, function=flexkernels.flow_update):
    results = update(place, arguments, function)
    plain = flexkernels.flow_update_ref(**arguments)
    exact = flexkernels.flow_update_ref(**convert(arguments, double=True))
    for result, formula, true in zip(results, plain, exact, strict=True):
        assert (result is None) == (true is None)
        if true is not None and interpreted(place) and result.dtype == torch.bfloat16:
            # the interpreter cuts bfloat16 off instead of rounding
            torch.testing.assert_close(result.double(), true, rtol=2**-7, atol=1e-6)
        elif true is not None:
            assert_accurate(result, formula, true)
    return results


@on_every_backend
@every_guidance
@pytest.mark.parametrize("v_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_accuracy(place, guidance, x_dtype, v_dtype):
    check(place, with_terms(draw(guidance, (2, 3, 5, 7, 9), x_dtype, v_dtype, prefix=(2, 3, 1, 7, 9))))


@on_every_backend
@every_guidance
@pytest.mark.parametrize(("states", "past"), [(1, 0), (1, 3), (3, 0), (2, 1), (3, 3)])
def test_ragged_rows_and_any_number_of_terms(place, guidance, states, past):
    check(place, with_terms(draw_ragged(guidance), states, past))


@on_every_backend
@every_guidance
def test_in_place_gives_the_same_bits(place, guidance):
    for arguments in (draw_ragged(guidance), draw(guidance, (2, 3, 33), torch.bfloat16, prefix=(2, 3, 5))):
        arguments = with_terms(arguments)
        expected = update(place, arguments)
        moved = convert(arguments, device=place[1])
        with flexkernels.backend(place[0]):
            results = flexkernels.flow_update_(**moved)
        assert results[0] is moved["x"][0]
        for result, wanted in zip(results, expected, strict=True):
            assert (result is None and wanted is None) or torch.equal(result.cpu(), wanted)


@on_every_backend
def test_terms_with_weight_zero_are_not_read(place):
    arguments = with_terms(draw(None, (1, 2, 40)), states=2, past=2, a=[1.0, 0.0], past_b=[0.0, 0.5])
    expected = update(place, arguments)
    arguments["x"][1].fill_(torch.nan)
    arguments["past"][0].fill_(torch.nan)
    for result, wanted in zip(update(place, arguments)[::2], expected[::2], strict=True):
        assert torch.equal(result, wanted)


@on_every_backend
@every_guidance
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(place, guidance, value):
    """A NaN is where the formula has it: all over the row where sums over it count."""
    arguments = with_terms(draw(guidance, (2, 3, 70)))
    clean = update(place, arguments)[::2]
    arguments["v_cond"][1, 0, 33] = value
    rows = torch.arange(6) != 3
    for result, before, formula in zip(
        update(place, arguments)[::2], clean, flexkernels.flow_update_ref(**arguments)[::2], strict=True
    ):
        assert torch.equal(result.flatten(0, 1)[rows], before.flatten(0, 1)[rows])
        assert not result[1, 0, 33].isfinite()
        assert value == torch.inf or torch.equal(result.isnan(), formula.isnan())


@on_every_backend
def test_empty_input_and_velocity_under_a_prefix(place):
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert [result.shape for result in check(place, with_terms(draw(CFG(2.0, 0.5), shape)))[::2]] == [shape] * 2
    values = torch.randn(1, 2, 8)
    x_next, _, v = check(place, with_terms(draw(CFG(2.0), (1, 2, 8))) | {"prefix": Prefix(values)})
    assert torch.equal(x_next, values) and not torch.equal(v, x_next)


def with_scalars(arguments):
    """The same update, its numbers on the device, others in their place."""
    guidance, prefix = arguments["guidance"], arguments.get("prefix")
    scale, time = guidance.scale if guidance else 1.0, prefix.time if prefix else 0.0
    row = solvers.scalars(arguments["a"], arguments["b"], arguments["past_b"], scale, time)
    changed = {"a": [7.0] * len(arguments["a"]), "b": 7.0, "past_b": [7.0] * len(arguments["past_b"])}
    changed |= {"guidance": replace(guidance, scale=7.0)} if guidance else {}
    changed |= {"prefix": replace(prefix, time=0.7)} if prefix else {}
    return arguments | changed | {"scalars": torch.tensor(row)}


@on_every_backend
@every_guidance
def test_scalars_on_the_device_give_the_same_bits(place, guidance):
    half = draw(guidance, (2, 3, 33), v_dtype=torch.bfloat16, prefix=(2, 3, 5))
    for arguments, function in ((draw_ragged(guidance), flexkernels.flow_update), (half, flexkernels.flow_update_)):
        arguments = with_terms(arguments)
        for result, wanted in zip(
            update(place, with_scalars(arguments), function), update(place, arguments), strict=True
        ):
            assert (result is None and wanted is None) or torch.equal(result, wanted)


@on_every_backend
def test_terms_whose_scalar_is_zero_are_not_read(place):
    arguments = with_terms(draw(None, (1, 2, 40)), states=3, past=2, a=[1.0, 0.0, 0.5], past_b=[0.0, 0.5])
    expected = update(place, arguments)
    arguments["x"][1].fill_(torch.nan)
    arguments["past"][0].fill_(torch.nan)
    assert torch.equal(update(place, with_scalars(arguments))[0], expected[0])


def test_scalars_are_for_float32_states():
    half = {"x": [X.half()], "a": [1.0], "v_cond": X, "b": 0.5}
    with pytest.raises(TypeError, match=r"x with scalars must be float32.*got float16"):
        flexkernels.flow_update(**half, scalars=torch.zeros(9))


@pytest.mark.parametrize(
    ("scalars", "error", "message"),
    [
        (torch.zeros(8), ValueError, r"scalars must have the shape \[9\], got \[8\]"),
        (torch.zeros(9).double(), TypeError, "scalars must be float32"),
        ([0.0] * 9, TypeError, r"scalars must be a torch\.Tensor, got list"),
    ],
)
def test_wrong_scalars_are_refused(scalars, error, message):
    for function in (flexkernels.flow_update, flexkernels.flow_update_, flexkernels.flow_update_ref):
        with pytest.raises(error, match=message):
            function(**CALL, scalars=scalars)


def test_scalars_have_no_gradient(monkeypatch):
    calls = called_ops(monkeypatch)
    for tensor in ("v_cond", "scalars"):
        given = {"v_cond": X, "scalars": torch.zeros(9)}
        given[tensor] = given[tensor].clone().requires_grad_()
        with pytest.raises(ValueError, match="scalars must be None where a gradient is asked for"):
            flexkernels.flow_update([X], [1.0], b=1.0, **given)
    # before anything is launched
    assert calls == []


def test_rows_of_scalars():
    row = solvers.scalars([1.0, 0.5], -0.1, [0.25], 3.0, 0.75)
    assert row == [1.0, 0.5, 0.0, -0.1, 0.25, 0.0, 0.0, 3.0, 0.75]
    for name, given in (("a", ([1.0] * 4, 0.0, [])), ("past_b", ([], 0.0, [1.0] * 4))):
        with pytest.raises(ValueError, match=f"{name} must have at most 3 entries, got 4"):
            solvers.scalars(*given)
    with pytest.raises(ValueError, match="b must be finite, got inf"):
        solvers.scalars([1.0], torch.inf, [])


# CFG with rescale


def published_rescale(v_cond, v_uncond, scale, phi):
    """arXiv 2305.08891, equations 15 and 16, with the standard deviation of each channel of a sample."""
    v = v_uncond + scale * (v_cond - v_uncond)
    dims = tuple(range(2, v.dim()))
    rescaled = v * (v_cond.std(dims, keepdim=True) / v.std(dims, keepdim=True))
    return phi * rescaled + (1 - phi) * v


def test_rescale_is_the_published_formula():
    v_cond, v_uncond = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    settings = {"b": 1.0, "guidance": CFG(5.0, rescale=0.7), "return_velocity": True}
    _, _, v = flexkernels.flow_update_ref([v_cond], [0.0], v_cond, v_uncond, **settings)
    torch.testing.assert_close(v, published_rescale(v_cond, v_uncond, 5.0, 0.7))


@on_every_backend
def test_rescale_far_from_zero_and_of_constant_rows(place):
    """A mean a thousand times the deviation costs no accuracy; a row without deviation keeps its velocity."""
    arguments = with_terms(draw(CFG(4.0, rescale=1.0), (1, 4, 300)), 1, 0)
    offset = torch.tensor([1000.0, -1000.0, 0.0, 0.0]).view(1, 4, 1)
    for name in ("v_cond", "v_uncond"):
        arguments[name] = (arguments[name] + offset) * torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 4, 1) + 2.0
    arguments["v_cond"][0, 3] = 3.0
    _, _, v = update(place, arguments)
    exact = flexkernels.flow_update_ref(**convert(arguments, double=True))[2]
    torch.testing.assert_close(v.double(), exact, rtol=1e-6, atol=0)
    assert (v[0, 2] == 2).all()
    single = with_terms(draw(CFG(4.0, rescale=0.5), (2, 2, 1)), 1, 0)
    torch.testing.assert_close(update(place, single)[2], flexkernels.flow_update_ref(**single)[2])


# gradient


@on_every_backend
@every_guidance
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients(place, guidance, ragged):
    arguments = with_terms(draw_ragged(guidance) if ragged else draw(guidance, (2, 3, 4, 5), prefix=(2, 3, 1, 5)))

    with flexkernels.backend(place[0]):
        found = gradients(flexkernels.flow_update, convert(arguments, place[1]))
    expected = gradients(flexkernels.flow_update_ref, convert(arguments, double=True))
    plain = gradients(flexkernels.flow_update_ref, arguments)
    assert set(found) == set(expected) >= {"x.2", "past.1", "v_cond", "prefix.values"}
    for name, grad in found.items():
        assert_accurate(grad, plain[name], expected[name])


def test_gradients_of_tuples():
    states, past = (tuple(torch.randn(1, 2, 3, requires_grad=i > 0) for i in range(2)) for _ in range(2))
    results = flexkernels.flow_update(states, (1.0, 0.5), torch.ones(1, 2, 3), b=1.0, past=past, past_b=(2.0, 0.25))
    results[0].sum().backward()
    assert (states[1].grad == 0.5).all() and (past[1].grad == 0.25).all()


def test_autograd_sees_what_was_written_in_place():
    """A backward that needs what was overwritten is refused, not wrong."""
    weight, x = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, 2, 3)
    for function in (flexkernels.flow_update_, torch.compile(flexkernels.flow_update_, backend="aot_eager")):
        y = (weight * x).sum()
        with torch.no_grad():
            function([x], [1.0], torch.ones(1, 2, 3), b=1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


# tracing


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
@pytest.mark.parametrize("function", [flexkernels.flow_update, flexkernels.flow_update_])
def test_compiles_to_one_graph(function, compiler):
    arguments = convert(with_terms(draw(CFG(3.0, rescale=0.5), (2, 3, 4, 5))), device=DEVICE)
    expected = flexkernels.flow_update(**arguments)
    results = torch.compile(function, fullgraph=True, backend=compiler)(**arguments)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[2], expected[2])
    assert torch.equal(arguments["x"][0], results[0]) == (function is flexkernels.flow_update_)


def test_one_compiled_graph_serves_all_scalars():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flexkernels.flow_update, fullgraph=True, backend=counter)
    arguments = convert(with_scalars(with_terms(draw(CFG(3.0), (2, 3, 8)))), device=DEVICE)
    for _ in range(3):
        arguments["scalars"] = torch.rand(9, device=DEVICE)
        assert torch.equal(compiled(**arguments)[0], flexkernels.flow_update(**arguments)[0])
    assert counter.frame_count == 1


# wrong input

X = torch.zeros(2, 3, 8)
CALL = {"x": [X, X], "a": [1.0, 2.0], "v_cond": X, "b": 0.5, "past": [X], "past_b": [1.0]}
WRONG = [
    ({"x": X}, TypeError, "x must be a list or tuple of tensors, got Tensor"),
    ({"x": []}, ValueError, "x must hold 1 to 3 tensors, got 0"),
    ({"x": [X] * 5}, ValueError, "x must hold 1 to 3 tensors, got 5"),
    ({"past": [X] * 5}, ValueError, "past must hold at most 3 tensors, got 5"),
    ({"a": [1.0]}, ValueError, "a must have 2 entries, one for each of x, got 1"),
    ({"a": 1.0}, TypeError, "a must be a list or tuple of numbers, got float"),
    ({"a": [1.0, torch.inf]}, ValueError, "a must be finite, got inf"),
    ({"past_b": []}, ValueError, "past_b must have 1 entries, one for each of past, got 0"),
    ({"b": "1"}, TypeError, "b must be a number, got str"),
    ({"x": [X, X.half()]}, TypeError, r"x\[1\] must be float32, got float16"),
    ({"x": [X, X[:1]]}, ValueError, r"x\[1\] must have the shape \[2, 3, 8\] of x\[0\], got \[1, 3, 8\]"),
    ({"past": [X.half()]}, TypeError, r"past\[0\] must be float32.*got float16"),
    ({"past": [X[0]]}, ValueError, r"past\[0\] must have the shape \[2, 3, 8\] of x, got \[3, 8\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    for function in (flexkernels.flow_update, flexkernels.flow_update_, flexkernels.flow_update_ref):
        with pytest.raises(error, match=message):
            function(**CALL | change)


def test_wrong_rescale_is_refused():
    with pytest.raises(ValueError, match=r"CFG rescale must be at least 0, got -0\.1"):
        CFG(2.0, rescale=-0.1)
    with pytest.raises(ValueError, match=r"CFG rescale must be at most 1, got 1\.1"):
        CFG(2.0, rescale=1.1)


def test_in_place_refuses_views_with_strides_and_gradients():
    with pytest.raises(ValueError, match=r"x\[0\] must be contiguous to be written in place"):
        flexkernels.flow_update_([X.transpose(0, 1)], [1.0], X.transpose(0, 1), b=1.0)
    with pytest.raises(ValueError, match="must need no gradient in place"):
        flexkernels.flow_update_([X.clone()], [1.0], X.clone().requires_grad_(), b=1.0)

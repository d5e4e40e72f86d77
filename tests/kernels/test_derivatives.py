"""Every op's derivatives beyond the first gradient are right, or the op says that it has none: never a silent zero."""

import contextlib

import pytest
import torch
from op_examples import EXAMPLES, WITHOUT, examples
from torch.func import grad, jvp, vmap

from flexkernels import library

STEP = 1e-5
RTOL = 1e-3


@pytest.fixture(params=sorted(library.OPS.keys() - WITHOUT))
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def no_level_left_open():
    """A trace that fails leaves its level of forward mode open, and every later test would fail with it."""
    yield
    torch.autograd.forward_ad._current_level, torch._functorch.eager_transforms.JVP_NESTING = -1, 0
    with contextlib.suppress(RuntimeError):
        torch._C._exit_dual_level(level=0)


def test_every_op_has_an_example():
    assert set(EXAMPLES) == set(library.OPS) - WITHOUT


def weighted(function):
    """`function` as one number: its floating results times numbers that tell their elements apart."""

    def scalar(*tensors):
        total = 0
        for i, result in enumerate(results_of(function(*tensors))):
            weights = torch.linspace(-1, 1 + i, result.numel(), dtype=torch.float64).view(result.shape)
            total = total + (result.double() * weights).sum()
        return total

    return scalar


def results_of(results):
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [r for r in results if r is not None and r.is_floating_point() and r.numel()]


def gradient(function, count):
    return grad(weighted(function), argnums=tuple(range(count)))


def difference(function, tensors, tangents):
    """The central difference quotient of a function of float64 tensors along the tangents."""
    ahead, behind = (
        function(*(x.double() + sign * STEP * t.double() for x, t in zip(tensors, tangents, strict=True)))
        for sign in (1, -1)
    )
    return [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]


def tangents_of(tensors):
    return tuple(torch.randn_like(x) for x in tensors)


def assert_right(found, expected):
    assert len(found) == len(expected)
    largest = max(x.abs().max() for x in expected)
    assert largest > 0
    for got, want in zip(found, expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), want, rtol=RTOL, atol=RTOL * float(largest))


def results_and(function):
    return lambda *tensors: tuple(results_of(function(*tensors)))


def first_order(example):
    tensors, tangents = tuple(example.tensors), tangents_of(example.tensors)
    return tensors, tangents, results_and(example.ours), lambda: difference(results_and(example.ref), tensors, tangents)


def second_order(example):
    """The gradient of a weighted sum, and what it changes by along the tangents: the Hessian times them."""
    tensors, tangents = tuple(example.tensors), tangents_of(example.tensors)
    exact = gradient(example.ref, len(tensors)) if example.ref else None
    return tensors, tangents, gradient(example.ours, len(tensors)), lambda: difference(exact, tensors, tangents)


def curved(name):
    return [example for example in examples(name) if not example.linear]


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def dual(function, tensors, tangents):
    """torch.autograd.forward_ad by hand, without torch.func."""
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        results = function(*map(forward_ad.make_dual, tensors, tangents))
        tangents = [forward_ad.unpack_dual(result).tangent for result in results]
    # what depends on no tensor has none
    return None, [torch.zeros_like(r) if t is None else t for r, t in zip(results, tangents, strict=True)]


FORWARD = {
    "eager": jvp,
    "dual": dual,
    "compiled": lambda function, *given: compiled(lambda x, t: jvp(function, x, t))(*given),
    "of a compiled function": lambda function, *given: jvp(torch.compile(function, backend="aot_eager"), *given),
}


@pytest.mark.parametrize("how", FORWARD)
def test_forward_mode(name, how):
    for example in examples(name):
        tensors, tangents, ours, expected = first_order(example)
        if example.forward:
            assert_right(FORWARD[how](ours, tensors, tangents)[1], expected())
        else:
            with refused(name, how):
                FORWARD[how](ours, tensors, tangents)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_forward_over_reverse(name, how):
    for example in curved(name):
        tensors, tangents, ours, expected = second_order(example)
        # what is for inference alone refuses a gradient before anything else; in a trace nobody asks for one
        if example.forward and (example.error is NotImplementedError or how == "compiled"):
            assert_right(FORWARD[how](ours, tensors, tangents)[1], expected())
        else:
            with refused(name, how, example.error):
                FORWARD[how](ours, tensors, tangents)


def test_reverse_over_forward(name):
    for example in curved(name):
        tensors, tangents, _, expected = second_order(example)
        scalar = weighted(example.ours)
        directional = grad(lambda *x, s=scalar, t=tangents: jvp(s, x, t)[1], argnums=tuple(range(len(tensors))))
        if example.forward:
            assert_right(directional(*tensors), expected())
        else:
            with refused(name):
                directional(*tensors)


def test_reverse_over_reverse(name):
    for example in curved(name):
        tensors, tangents, _, expected = second_order(example)
        leaves = [x.clone().requires_grad_() for x in tensors]
        if not example.backward:
            with refused(name, error=example.error):
                weighted(example.ours)(*leaves).backward()
            continue
        grads = torch.autograd.grad(weighted(example.ours)(*leaves), leaves, create_graph=True)
        product = sum((g.double() * t.double()).sum() for g, t in zip(grads, tangents, strict=True))
        if example.second:
            assert_right(torch.autograd.grad(product, leaves, materialize_grads=True), expected())
        else:
            with pytest.raises(NotImplementedError, match=r"flexkernels\.\w+ has no derivative of this order"):
                product.backward()


def test_gradients_in_nested_transforms(name):
    """Gradients of samples one by one, by torch.func.vmap of torch.func.grad."""
    for example in examples(name):
        if not example.backward:
            continue
        pairs = [
            torch.stack([x, x + 0.1 * t]) for x, t in zip(example.tensors, tangents_of(example.tensors), strict=True)
        ]
        count = len(pairs)
        together = vmap(gradient(example.ours, count))(*pairs)
        for i in range(2):
            expected = gradient(example.ref, count)(*(x[i].double() for x in pairs))
            assert_right([g[i] for g in together], expected)


def refused(name, how="eager", error=NotImplementedError):
    # a compiler wraps the error
    return pytest.raises(error if how in ("eager", "dual") else Exception, match=rf"flexkernels\.{name} ")

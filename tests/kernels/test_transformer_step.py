"""A step through a stack of blocks: its own parts bit by bit, its reference, and clear errors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import DEVICE, FLOATS, assert_accurate, repeat_at_level
from step_cases import Case, by_parts, draw_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import StackWeights, _native, transformer_step_, transformer_step_ref_

needs_native = pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")
EPS = 1e-6


CASES = {
    "one": dict(rows=1, heads=2, head_dim=64),
    "guided": dict(rows=2, heads=3, head_dim=64, layers=3, hidden=129),
    "full": dict(rows=16, heads=1, head_dim=17),
    "int8": dict(rows=4, heads=2, head_dim=32, int8=True),
    "contexts": dict(rows=6, heads=2, head_dim=32, contexts=6),
    "shared context": dict(rows=6, heads=2, head_dim=32, contexts=2, int8=True),
}


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_native_step_equals_its_parts(name, dtype):
    case = Case(dtype=dtype, **CASES[name])
    for got, want in zip(case.run(transformer_step_), case.run(by_parts), strict=True):
        assert torch.equal(got, want)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, dict(rows=2, heads=2, head_dim=32)),
        (torch.float32, dict(rows=4, heads=1, head_dim=17, contexts=2)),
        (torch.float16, dict(rows=9, heads=2, head_dim=16, int8=True)),
    ],
)
def test_cuda_step_equals_its_parts(dtype, options):
    case = Case(dtype=dtype, layers=1, hidden=34, **options)
    case.cache_len.clamp_(max=40)
    with flexkernels.backend("cuda"):
        for got, want in zip(case.run(transformer_step_), case.run(by_parts), strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE == "cuda" or flexkernels.available_backends()["triton"] is not None, reason="no interpreter")
def test_triton_step_equals_its_parts():
    # small: the interpreter is slow
    case = Case(1, 1, 16, torch.float32, layers=1, hidden=8)
    case.cache_len.fill_(20)
    with flexkernels.backend("triton"):
        for got, want in zip(case.run(transformer_step_), case.run(by_parts), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["guided", "int8", "shared context"])
def test_accuracy(name, dtype, backend):
    case = Case(dtype=dtype, **CASES[name])
    if not case.weights.int8:
        exact = case.run(transformer_step_ref_, torch.Tensor.double)
    with flexkernels.backend(backend):
        got = case.run(transformer_step_)
    formula = case.run(transformer_step_ref_)
    if case.weights.int8:
        exact = [t.double() for t in formula]
        assert (got[0].double() - exact[0]).norm() < 10 * torch.finfo(dtype).eps * exact[0].norm()
    else:
        assert_accurate(got[0], formula[0], exact[0])
    # of the caches, one position of each row is written
    written = (got[1] != case.caches[0]).any(-1).any(2).any(0)
    want = torch.arange(310) == torch.cat([case.cache_len, torch.tensor([0])])[:, None] - 1
    assert torch.equal(written, want)


@needs_native
def test_rows_do_not_depend_on_each_other():
    case = Case(5, 2, 64, torch.float32)
    x, _, _ = case.run(transformer_step_)
    for row in range(5):
        alone = case.x[row : row + 1].clone()
        k, v = case.caches.clone()[:, :, row : row + 1]
        transformer_step_(alone, case.weights, k, v, case.cache_len[row : row + 1])
        assert torch.equal(alone[0], x[row])


def test_no_rows():
    case = Case(2, 2, 32, torch.float32)
    empty = case.caches[:, :, :0]
    transformer_step_(case.x[:0], case.weights, *empty, case.cache_len[:0])


def test_opcheck_and_fake():
    case = Case(2, 2, 32, torch.float32, contexts=2)
    pairs = [t for pair in case.cross["cross"] for t in pair]
    weights = case.weights
    caches = case.caches[:, :, :2]
    arguments = (case.x, *caches, case.cache_len, weights.norms, weights.weights, [], pairs, case.cross["cross_len"])
    torch.library.opcheck(torch.ops.flexkernels.transformer_step_.default, (*arguments, EPS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        case.run(transformer_step_)


def test_compiles_without_a_break():
    case = Case(2, 2, 32, torch.float32)
    compiled = torch.compile(transformer_step_, fullgraph=True, backend="aot_eager")
    for got, want in zip(case.run(compiled), case.run(transformer_step_), strict=True):
        assert torch.equal(got, want)


def test_no_gradient():
    case = Case(2, 2, 32, torch.float32)
    with pytest.raises(RuntimeError, match=r"has no gradient: call it under torch.no_grad\(\)"):
        transformer_step_(case.x.requires_grad_(), case.weights, *case.caches[:, :, :2], case.cache_len)


@needs_native
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_isa_level(level):
    """The tests of the native step once more, in a process that is held to `level`."""
    repeat_at_level(__file__, "native_step", level)


# wrong input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 64).half()}, ValueError, "x must be float32 on cpu like the weights, got float16 on cpu"),
        ({"x": torch.zeros(2, 60)}, ValueError, r"x must have the shape \[2, 64\], got \[2, 60\]"),
        ({"x": torch.zeros(17, 64)}, ValueError, "x must have at most 16 rows, got 17"),
        ({"x": torch.zeros(64, 2).T}, ValueError, "x must be contiguous"),
        ({"weights": []}, TypeError, "weights must be StackWeights, got list"),
        ({"k": torch.zeros(2, 2, 9, 32)}, ValueError, "k_cache must have 5 dimensions"),
        ({"k": torch.zeros(3, 2, 2, 9, 32)}, ValueError, r"k_cache must have 2 layers, and heads \* head_dim = 64"),
        ({"v": torch.zeros(2, 2, 2, 8, 32)}, ValueError, "v_cache must have the shape"),
        ({"k": torch.zeros(2, 3, 2, 9, 32)}, ValueError, r"k_cache must have the shape \[2, kv_heads, max_len, 32\]"),
        ({"cache_len": torch.tensor([1, 2])}, TypeError, "cache_len must be int32"),
        ({"cache_len": torch.tensor([0, 2]).int()}, ValueError, "cache_len must lie between 1 and 9, got 0"),
        ({"cache_len": torch.tensor([1, 10]).int()}, ValueError, "cache_len must lie between 1 and 9, got 10"),
        ({"cross_len": torch.ones(2).int()}, ValueError, "must be None: the weights have no cross_q, got cross_len"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_wrong_steps(change, error, message):
    weights = StackWeights(draw_blocks(2, 64, 10, torch.float32))
    good = dict(
        x=torch.zeros(2, 64), weights=weights, k=torch.zeros(2, 2, 2, 9, 32), v=torch.zeros(2, 2, 2, 9, 32),
        cache_len=torch.ones(2, dtype=torch.int32),
    )  # fmt: skip
    x, weights, k, v, cache_len = ((good | change)[name] for name in good)
    named = {name: value for name, value in change.items() if name not in good}
    with pytest.raises(error, match=message):
        transformer_step_(x, weights, k, v, cache_len, **named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross": None}, "cross and cross_len must be given together, got cross_len"),
        ({"cross": None, "cross_len": None}, "cross and cross_len must be given together, got neither"),
        ({"cross": [(torch.zeros(2, 2, 5, 32),) * 2]}, "cross must have one pair for each of 2 layers, got 1"),
        ({"cross": [(torch.zeros(2, 1, 5, 32),) * 2] * 2}, "cross must have 2 heads like k_cache, got 1"),
        ({"cross_len": torch.ones(3).int()}, "cross_len must have as many entries as divide 4 rows"),
        ({"cross_len": torch.tensor([6, 1]).int()}, "cross_len must lie between 0 and 5, got 6"),
    ],
)
def test_wrong_contexts(change, message):
    weights = StackWeights(draw_blocks(2, 64, 10, torch.float32, cross=True))
    cross = {"cross": [(torch.zeros(2, 2, 5, 32),) * 2] * 2, "cross_len": torch.ones(2).int()} | change
    caches = torch.zeros(2, 2, 4, 2, 9, 32)
    with pytest.raises(ValueError, match=message):
        transformer_step_(torch.zeros(4, 64), weights, *caches, torch.ones(4).int(), **cross)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(192, 60)}, ValueError, r"qkv must have the shape \[192, 64\], got \[192, 60\]"),
        ({"w13": torch.zeros(21, 64)}, ValueError, r"w13 must have the shape \[20, 64\]"),
        ({"w2": torch.zeros(64, 10).half()}, TypeError, "w2 must be float32, got float16"),
        ({"norm_mlp": torch.zeros(60)}, ValueError, r"norm_mlp must have the shape \[64\] of norm_attn"),
        ({"norm_cross": torch.ones(64)}, ValueError, "every block must have norm_attn, .* got .*norm_cross"),
        (
            {"w2": (torch.zeros(64, 10).to(torch.int8), torch.ones(64))},
            TypeError,
            "w2 must be one of tensors like the first, got a pair",
        ),
    ],
)
def test_wrong_weights(change, error, message):
    first, second = draw_blocks(2, 64, 10, torch.float32)
    with pytest.raises(error, match=message):
        StackWeights([first, replace(second, **change)])


def test_wrong_int8_weights():
    first, second = draw_blocks(2, 64, 10, torch.float32, int8=True)
    with pytest.raises(TypeError, match=r"qkv must be one of \(int8, scale\) pairs like the first, got a tensor"):
        StackWeights([first, replace(second, qkv=torch.zeros(192, 64))])
    with pytest.raises(ValueError, match=r"qkv scale must have the shape \[192\], got \[1\]"):
        StackWeights([first, replace(second, qkv=(second.qkv[0], torch.ones(1)))])
    with pytest.raises(ValueError, match="blocks must not be empty"):
        StackWeights([])


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_on_a_gpu():
    case = Case(2, 2, 32, torch.float32)
    case.cache_len = case.cache_len.cuda()
    for backend in ("cuda", "triton"):
        with flexkernels.backend(backend):
            got, want = (case.run(step, torch.Tensor.cuda)[0] for step in (transformer_step_, by_parts))
        assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_one_kernel_on_a_gpu(rows):
    """Accurate; the same bits again, in a CUDA graph, and beside another stream's step."""
    case = Case(rows, 4, 64, torch.bfloat16, layers=3, hidden=192)
    case.cache_len = case.cache_len.cuda()
    one = partial(transformer_step_, persistent=True)
    with flexkernels.backend("cuda"):
        got = case.run(one, torch.Tensor.cuda)
    formula = case.run(transformer_step_ref_, torch.Tensor.cuda)[0]
    assert_accurate(got[0], formula, case.run(transformer_step_ref_, lambda t: t.cuda().double())[0])
    x, caches = case.x.cuda(), case.caches.cuda()[:, :, :rows]
    weights = StackWeights(
        [replace(b, **{n: None if t is None else t.cuda() for n, t in vars(b).items()}) for b in case.blocks]
    )
    inputs = [x.clone() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for y, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            # both write the same into the caches
            one(y, weights, *caches, case.cache_len)
    torch.cuda.synchronize()
    graph, y = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y.copy_(x)
        one(y, weights, *caches, case.cache_len)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for each in (*inputs, y):
        assert torch.equal(each, got[0])

"""The Triton attention kernels against dense float64 attention: plans, masks, strides, gradients."""

import itertools
from typing import NamedTuple

import pytest
import torch
from helpers import DEVICE, FLOATS, assert_accurate

from flexkernels import SequenceLayout, library
from flexkernels.layout import MASKS, visible

pytest.importorskip("triton")
if DEVICE == "cpu" and not library.interpreting():
    pytest.skip("Triton kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from flexkernels.triton import attention as kernels
from flexkernels.triton.attention import Loop, Tiles

FLEX = {"prefix_to_register": "none", "register_to_prefix": "none", "register_to_register": "causal"}
OTHER = {"prefix_to_prefix": "none", "register_to_register": "none"}
CASES = {
    "full": ("full", None),
    "causal": ("causal", None),
    "frame_causal": ("frame_causal", None),
    "frame_causal_prefix": ("frame_causal_prefix", None),
    "flexible": ("frame_causal_prefix", FLEX),
    "other": ("frame_causal_prefix", OTHER),
}
# ragged frames, an empty sequence, an empty frame, frames without prefix or registers, frames of several tiles
FRAMES = [[(7, 5), (3, 0), (0, 0), (0, 4)], [], [(1, 0)], [(20, 33), (20, 5)]]
# steps that divide a tile, are a tile, and are longer than one
SMALL = Tiles(32, 16, Loop(16, 4, 1), Loop(16, 4, 1), Loop(32, 4, 1))
LONG_STEPS = Tiles(16, 32, Loop(64, 4, 1), Loop(32, 4, 1), Loop(16, 4, 1))


class Problem(NamedTuple):
    """Queries and keys of the same number of sequences, and which see which."""

    queries: SequenceLayout
    keys: SequenceLayout
    mask: int
    cross: tuple[int, ...]
    seen: torch.Tensor


def pose(case, frames=FRAMES, key_frames=None):
    name, cross = CASES[case]
    queries, keys = (SequenceLayout(f, name, cross) for f in (frames, key_frames or frames))
    seen = torch.zeros(queries.total, keys.total, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(x.cu_seqlens.tolist()) for x in (queries, keys)), strict=True):
        # causal: the ends of queries and keys are aligned
        position = torch.arange(q1 - q0) + (k1 - k0) - (q1 - q0)
        rows = position, queries.frame[q0:q1], queries.rank[q0:q1]
        seen[q0:q1, k0:k1] = visible(
            name, queries.cross, *rows, torch.arange(k1 - k0), keys.frame[k0:k1], keys.rank[k0:k1]
        )
    return Problem(queries, keys, MASKS.index(name), queries.cross, seen)


def ranges_seen(part, first, block):
    """[begin, end, full] of the keys that rows see, full ones first, neighbours in one; part [rows, keys]."""
    found = {True: [], False: []}
    for begin in range(0, part.shape[1], block):
        chunk = part[:, begin : begin + block]
        runs, end = found[bool(chunk.all())], begin + chunk.shape[1]
        if runs and runs[-1][1] == first + begin:
            runs[-1][1] = first + end
        elif chunk.any():
            runs.append([first + begin, first + end, bool(chunk.all())])
    # what is not full may have been run together with what sees nothing
    return found[True] + found[False], len(found[True])


def plan(seen, rows, others, block, other_block):
    """What SequenceLayout.plan lists, from the dense mask: tiles of rows, and the ranges of others that each sees."""
    tiles, ptr, ranges = [], [0], []
    bounds = zip(itertools.pairwise(rows), itertools.pairwise(others), strict=True)
    for sequence, ((first, last), (begin, end)) in enumerate(bounds):
        for at in range(first, last, block):
            stop = min(at + block, last)
            found, full = ranges_seen(seen[at:stop, begin:end], begin, other_block)
            ranges += found
            ptr.append(len(ranges))
            tiles.append([sequence, at, stop, full])
    as_int = lambda x, *shape: torch.tensor(x, dtype=torch.int32, device=DEVICE).reshape(shape)  # noqa: E731
    return as_int(tiles, -1, 4), as_int(ptr, -1), as_int(ranges, -1, 3)


def draw(problem, heads=2, kv_heads=2, head_dim=16, dtype=torch.float32, extra=0):
    shapes = [(problem.queries.total, heads), (problem.keys.total, kv_heads), (problem.keys.total, kv_heads)]
    return [torch.randn(n + extra, h, head_dim).to(dtype) for n, h in shapes]


def metadata(problem):
    sides = (problem.queries, problem.keys)
    tokens = (x for side in sides for x in (side.frame, side.rank))
    return [x.to(DEVICE) for x in (*tokens, *(side.cu_seqlens for side in sides))]


def plans(problem, tiles):
    q, k = (side.cu_seqlens.tolist() for side in (problem.queries, problem.keys))
    return (
        plan(problem.seen, q, k, tiles.block_q, tiles.block_k),
        plan(problem.seen.T, k, q, tiles.block_k, tiles.block_q),
    )


def forward(problem, q, k, v, weight=None, scale=0.3, tiles=SMALL, with_lse=True):
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=DEVICE)
    lse = torch.empty(q.shape[:2], device=DEVICE) if with_lse else None
    weight = None if weight is None else weight.to(DEVICE)
    kernels.attention_triton(
        q, k, v, *metadata(problem), *plans(problem, tiles)[0], weight, problem.mask, problem.cross, scale, out, lse,
        rows=tiles.block_q, tiles=tiles,
    )  # fmt: skip
    return out, lse


def backward(problem, grad_out, q, k, v, out, lse, weight=None, scale=0.3, tiles=SMALL, grads=None):
    grad_out, q, k, v, out, lse = (x.to(DEVICE) for x in (grad_out, q, k, v, out, lse))
    grads = grads or [torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for x in (q, k, v)]
    weight = None if weight is None else weight.to(DEVICE)
    own, transposed = plans(problem, tiles)
    kernels.attention_backward_triton(
        grad_out, q, k, v, out, lse, *metadata(problem), *own, *transposed, weight, problem.mask, problem.cross, scale,
        *grads, rows=max(tiles.block_q, tiles.block_k), tiles=tiles,
    )  # fmt: skip
    return grads


def formula(problem, q, k, v, weight=None, scale=0.3):
    """Dense attention in float32, or in float64 for float64 input; out in q's dtype, and lse."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    wq, wk, wv = q.to(wide), k.to(wide).repeat_interleave(group, 1), v.to(wide).repeat_interleave(group, 1)
    scores = scale * torch.einsum("qhd,khd->hqk", wq, wk)
    if weight is not None:
        scores = scores + weight
    scores = scores.masked_fill(~problem.seen, float("-inf"))
    blind = ~problem.seen.any(1)[:, None]
    p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("hqk,khd->qhd", p, wv).to(q.dtype), torch.logsumexp(scores, -1).T


def gradients(problem, grad_out, q, k, v, weight=None, scale=0.3, dtype=torch.float64):
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    formula(problem, *leaves, weight, scale)[0].backward(grad_out.to(dtype))
    return [x.grad for x in leaves]


def check_forward(problem, q, k, v, weight=None, scale=0.3, tiles=SMALL):
    out, lse = forward(problem, q, k, v, weight, scale, tiles)
    exact, exact_lse = formula(problem, q.double(), k.double(), v.double(), weight, scale)
    plain, plain_lse = formula(problem, q, k, v, weight, scale)
    assert_accurate(out, plain, exact)
    blind = exact_lse == float("-inf")
    assert torch.equal(lse.cpu() == float("-inf"), blind)
    assert_accurate(lse.cpu()[~blind], plain_lse[~blind], exact_lse[~blind])
    return out, lse


def check_backward(problem, q, k, v, weight=None, scale=0.3, tiles=SMALL):
    grad_out = torch.randn(q.shape).to(q.dtype)
    out, lse = forward(problem, q, k, v, weight, scale, tiles)
    got = backward(problem, grad_out, q, k, v, out, lse, weight, scale, tiles)
    exact = gradients(problem, grad_out, q, k, v, weight, scale)
    plain = gradients(problem, grad_out, q, k, v, weight, scale, q.dtype)
    for grad, want, formula_grad in zip(got, exact, plain, strict=True):
        if q.dtype != torch.float32:
            assert_accurate(grad, formula_grad, want)
        elif want.numel():
            # over all elements: the largest error of few float32 roundings is a lottery
            error, allowed = ((x.cpu().double() - want).norm() for x in (grad, formula_grad))
            assert error <= 2 * max(allowed, torch.finfo(torch.float32).eps / 2 * want.norm())


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    problem = pose(case)
    check_forward(problem, *draw(problem), torch.randn(problem.keys.total))


@pytest.mark.parametrize("case", CASES)
def test_backward(case):
    problem = pose(case)
    check_backward(problem, *draw(problem), torch.randn(problem.keys.total))


@pytest.mark.parametrize("case", ["causal", "flexible"])
def test_grouped_heads_steps_beyond_tiles_and_negative_scale(case):
    problem = pose(case)
    tensors = draw(problem, heads=6, kv_heads=2)
    check_forward(problem, *tensors, scale=-0.4, tiles=LONG_STEPS)
    check_backward(problem, *tensors, scale=-0.4, tiles=LONG_STEPS)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [1, 17, 32, 64, 80])
def test_head_dims(head_dim, dtype):
    problem = pose("frame_causal_prefix", [[(20, 33)], [(3, 2)]])
    tensors = draw(problem, 1, 1, head_dim, dtype)
    check_forward(problem, *tensors, scale=head_dim**-0.5)
    check_backward(problem, *tensors, scale=head_dim**-0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_the_tiles_it_chooses(head_dim, dtype):
    problem = pose("frame_causal", [[(70, 90), (5, 0)]])
    tensors = draw(problem, 1, 1, head_dim, dtype)
    tiles = kernels.tiles_of(dtype, head_dim)
    check_forward(problem, *tensors, scale=head_dim**-0.5, tiles=tiles)
    check_backward(problem, *tensors, scale=head_dim**-0.5, tiles=tiles)


@pytest.mark.parametrize("key_frames", [[[(60, 0)], [(5, 0)], [], [(2, 0)]], [[(9, 0)], [(80, 0)], [(3, 0)], []]])
@pytest.mark.parametrize("case", ["full", "causal"])
def test_other_lengths_of_keys(case, key_frames):
    """Longer and shorter keys, rows that see nothing (causal, or no keys), keys that nothing sees."""
    problem = pose(case, [[(33, 0)], [(17, 0)], [], [(4, 0)]], key_frames)
    tensors = draw(problem)
    out, lse = check_forward(problem, *tensors)
    blind = ~problem.seen.any(1)
    assert blind.any() or case == "full"
    assert (out.cpu()[blind] == 0).all()
    assert (lse.cpu()[blind] == float("-inf")).all()
    check_backward(problem, *tensors)


def test_frames_of_keys_of_their_own():
    """Registers that see the frames of another packing."""
    problem = pose("frame_causal_prefix", [[(0, 9), (0, 30)], [(0, 3)]], [[(20, 0), (18, 2), (7, 0)], [(5, 5)]])
    check_forward(problem, *draw(problem))
    check_backward(problem, *draw(problem))


def test_strided_views_and_repeatability():
    problem = pose("flexible")
    q, k, v = draw(problem)
    grad_out = torch.randn(q.shape)
    plain = forward(problem, q, k, v)
    grads = backward(problem, grad_out, q, k, v, *plain)
    merged, merged_grad = torch.cat([q, k, v], 1).to(DEVICE), torch.empty(len(q), 6, 16, device=DEVICE)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for views in (merged.split(2, 1), by_head):
        again = forward(problem, *views)
        assert torch.equal(again[0], plain[0])
        assert torch.equal(again[1], plain[1])
        assert torch.equal(forward(problem, *views, with_lse=False)[0], plain[0])
        backward(problem, grad_out, *views, *again, grads=merged_grad.split(2, 1))
        assert torch.equal(merged_grad, torch.cat(grads, 1))


def test_expanded_gradient():
    problem = pose("causal")
    q, k, v = draw(problem)
    ones = torch.ones(q.shape)
    out, lse = forward(problem, q, k, v)
    got = backward(problem, torch.ones(()).expand(q.shape), q, k, v, out, lse)
    for grad, want in zip(got, backward(problem, ones, q, k, v, out, lse), strict=True):
        assert torch.equal(grad, want)


def test_rows_in_no_tile_are_left_alone():
    problem = pose("frame_causal")
    q, k, v = draw(problem, extra=3)
    k[problem.keys.total :] = float("nan")
    out, lse = forward(problem, q, k, v)
    grads = backward(problem, torch.ones(q.shape), q, k, v, out, lse)
    for x in (out, lse, *grads):
        assert torch.isfinite(x[: problem.queries.total]).all()
        assert torch.isnan(x[problem.queries.total :]).all()


def test_no_tokens():
    problem = pose("causal", [[], []])
    q, k, v = draw(problem)
    out, lse = forward(problem, q, k, v)
    assert out.shape == q.shape
    backward(problem, out, q, k, v, out, lse)


def test_large_logits():
    """Logits of +-1e4: the running maximum keeps exponentials in range; rows far below others stay right."""
    problem = pose("frame_causal_prefix")
    q, k, v = draw(problem)
    check_forward(problem, 100 * q, 100 * k, v)

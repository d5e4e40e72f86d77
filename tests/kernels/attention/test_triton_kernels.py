"""The Triton attention kernels against dense float64 attention: plans, masks, strides, gradients."""

from typing import NamedTuple

import pytest
import torch
from helpers import DEVICE, FLOATS, assert_accurate

import flexkernels
from flexkernels import SequenceLayout, library
from flexkernels.layout import MASKS, LayoutTensors, plan

pytest.importorskip("triton")
if DEVICE == "cpu" and not library.interpreting():
    pytest.skip("Triton kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from flexkernels.triton import attention as kernels
from flexkernels.triton import attention_backward as backward_kernels

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


def sizes(block, step, warps=4, stages=1):
    return dict(block=block, step=step, warps=warps, stages=stages)


class Tiles(NamedTuple):
    """What a plan is made for, and the kernels' own sizes; None: those of the tuning table."""

    rows: int = 64
    step: int = 64
    forward: dict | None = None
    backward: tuple[dict, dict] | None = None


# steps that divide a tile, are a tile, and are longer than one; tiles of several blocks
SMALL = Tiles(32, 16, sizes(32, 16), (sizes(32, 16), sizes(16, 32)))
LONG_STEPS = Tiles(16, 32, sizes(16, 64), (sizes(16, 32), sizes(32, 16)))
PARTS = Tiles(64, 32, sizes(16, 16), (sizes(32, 16), sizes(16, 16)))
DESCRIBED = SMALL._replace(forward=sizes(32, 16) | {"tma": True})


class Problem(NamedTuple):
    """A layout, and which query sees which key."""

    layout: SequenceLayout
    seen: torch.Tensor

    def arguments(self, tiles):
        sides, mask = (self.layout.queries, self.layout.keys), MASKS.index(self.layout.mask)
        made = plan(*sides, mask, self.layout.cross, tiles.rows, tiles.step)
        tokens = [torch.from_numpy(x) for side in sides for x in side.tokens]
        tensors = LayoutTensors(*tokens, *(torch.from_numpy(x) for x in made), self.layout.tensors.weighted)
        return [x.to(DEVICE) for x in tensors], mask, self.layout.cross


def pose(case, frames=FRAMES, key_frames=None, weighted_keys=None):
    layout = SequenceLayout(frames, *CASES[case], key_frames=key_frames, weighted_keys=weighted_keys)
    return Problem(layout, layout.visible())


def draw(problem, heads=2, kv_heads=2, head_dim=16, dtype=torch.float32, extra=0):
    rows, keys = problem.layout.total, problem.layout.total_k
    shapes = [(rows, heads), (keys, kv_heads), (keys, kv_heads)]
    return [torch.randn(n + extra, h, head_dim).to(dtype) for n, h in shapes]


def forward(problem, q, k, v, weight=None, scale=0.3, tiles=SMALL):
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=DEVICE)
    lse = torch.empty(q.shape[1], q.shape[0], device=DEVICE)
    weight = None if weight is None else weight.to(DEVICE)
    layout, *mask = problem.arguments(tiles)
    kernels.launch(q, k, v, layout, weight, *mask, scale, out, lse, chosen=tiles.forward)
    return out, lse


def backward(problem, grad_out, q, k, v, out, lse, weight=None, scale=0.3, tiles=SMALL):
    grad_out, q, k, v, out, lse = (x.to(DEVICE) for x in (grad_out, q, k, v, out, lse))
    grads = [torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for x in (q, k, v)]
    weight = None if weight is None else weight.to(DEVICE)
    layout, *mask = problem.arguments(tiles)
    backward_kernels.launch(grad_out, q, k, v, out, lse, layout, weight, *mask, scale, *grads, chosen=tiles.backward)
    return grads


def formula(problem, q, k, v, weight=None, scale=0.3):
    """Dense attention in float32, or in float64 for float64 input; out in q's dtype, and lse [heads, rows]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    wq, wk, wv = q.to(wide), k.to(wide).repeat_interleave(group, 1), v.to(wide).repeat_interleave(group, 1)
    scores = scale * torch.einsum("qhd,khd->hqk", wq, wk)
    if weight is not None:
        scores = scores + weight
    scores = scores.masked_fill(~problem.seen, float("-inf"))
    blind = ~problem.seen.any(1)[:, None]
    p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("hqk,khd->qhd", p, wv).to(q.dtype), torch.logsumexp(scores, -1)


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
    check_forward(problem, *draw(problem), torch.randn(problem.layout.total_k))


@pytest.mark.parametrize("case", CASES)
def test_backward(case):
    problem = pose(case)
    check_backward(problem, *draw(problem), torch.randn(problem.layout.total_k))


@pytest.mark.parametrize("tiles", [LONG_STEPS, PARTS], ids=["long steps", "parts"])
@pytest.mark.parametrize("case", ["causal", "frame_causal_prefix", "flexible"])
def test_grouped_heads_other_tiles_and_negative_scale(case, tiles):
    problem = pose(case)
    tensors = draw(problem, heads=6, kv_heads=2)
    check_forward(problem, *tensors, scale=-0.4, tiles=tiles)
    check_backward(problem, *tensors, scale=-0.4, tiles=tiles)


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
    check_forward(problem, *tensors, scale=head_dim**-0.5, tiles=Tiles())
    check_backward(problem, *tensors, scale=head_dim**-0.5, tiles=Tiles())


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
    assert (lse.cpu()[:, blind] == float("-inf")).all()
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
    merged = torch.cat([q, k, v], 1).to(DEVICE)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for views in (merged.split(2, 1), by_head):
        again = forward(problem, *views)
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
        for grad, want in zip(backward(problem, grad_out, *views, *again), grads, strict=True):
            assert torch.equal(grad, want)


with_descriptors = pytest.mark.skipif(not kernels.has_tma(torch.device(DEVICE)), reason="no TMA")


@with_descriptors
@pytest.mark.parametrize(
    "case, dtype, weighted",
    [("full", torch.float16, False), ("causal", torch.bfloat16, True), ("flexible", torch.float32, False)],
)
def test_descriptors_give_the_bits_of_pointers(case, dtype, weighted):
    problem = pose(case, [[(7, 5), (3, 0)], [], [(20, 33)]])
    q, k, v = draw(problem, 2, 2, 16, dtype)
    weight = torch.randn(problem.layout.total_k) if weighted else None
    # a view into a fused projection: rows apart
    k, v = torch.cat([k, v], 1).to(DEVICE).split(2, 1)
    assert all(kernels.descriptors(k, v, DESCRIBED.forward))
    want, got = (forward(problem, q, k, v, weight, tiles=tiles) for tiles in (SMALL, DESCRIBED))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gpus_that_have_descriptors(monkeypatch):
    has_tma, device = kernels.has_tma.__wrapped__, torch.device("cuda", 0)
    for capability, hip, has in [
        ((8, 9), None, False),
        ((9, 0), None, True),
        ((12, 0), None, True),
        ((9, 4), "6.3", False),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert has_tma(device) == has


# views of [30, 2, 16] that no descriptor holds
VIEWS = {
    "heads apart": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "begins off 16 bytes": lambda x: torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape).copy_(x),
    "rows off 16 bytes": lambda x: torch.cat([x.flatten(1), x[:, 0, :1]], 1)[:, :-1].unflatten(1, x.shape[1:]),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "head_dim below a block's": lambda x: x[..., :8].contiguous(),
    "head_dim of no power of two": lambda x: x.repeat(1, 1, 3)[..., :24].contiguous(),
}


@with_descriptors
@pytest.mark.parametrize("view", VIEWS)
def test_what_no_descriptor_holds_is_read_through_pointers(view):
    problem = pose("frame_causal", [[(20, 0)], [(3, 7)]])
    k = VIEWS[view](draw(problem)[1].to(DEVICE))
    q = torch.randn(k.shape)
    assert kernels.descriptors(k, k, DESCRIBED.forward) == (None, None)
    want, got = (forward(problem, q, k, k, tiles=tiles) for tiles in (SMALL, DESCRIBED))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def through_the_op(problem, q, k, v, grad=None, weight=None):
    """out, and given a gradient of it those of q, k and v, from `attention` with Triton forced."""
    leaves = [x.to(DEVICE).requires_grad_(grad is not None) for x in (q, k, v)]
    layout = SequenceLayout(FRAMES, problem.layout.mask, device=DEVICE)
    with flexkernels.backend("triton"):
        out = flexkernels.attention(*leaves, layout, key_log_weight=weight)
        return (out, *torch.autograd.grad(out, leaves, grad)) if grad is not None else out


def test_expanded_gradient():
    problem = pose("causal")
    tensors = draw(problem)
    ones = torch.ones(tensors[0].shape, device=DEVICE)
    got = through_the_op(problem, *tensors, grad=torch.ones((), device=DEVICE).expand(ones.shape))
    for grad, want in zip(got, through_the_op(problem, *tensors, grad=ones), strict=True):
        assert torch.equal(grad, want)


def test_weights_that_are_not_contiguous():
    problem = pose("frame_causal")
    tensors = draw(problem)
    every_other = torch.randn(2 * problem.layout.total, device=DEVICE)[::2]
    expanded = torch.randn(1, device=DEVICE).expand(problem.layout.total)
    for weight in (every_other, expanded):
        got = through_the_op(problem, *tensors, weight=weight)
        assert torch.equal(got, through_the_op(problem, *tensors, weight=weight.contiguous()))


# of FRAMES: 3 keys of the first sequence, none of the empty one, the only key of the third, 18 of the last: two steps
WEIGHTED = [8, 15, 18, 19, *range(25, 42), 70]


@pytest.mark.parametrize("head_dim", [16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_listed_weights(case, dtype, head_dim):
    """As weights of all keys, whatever the weights: none, small, and larger than any score."""
    problem = pose(case, weighted_keys=WEIGHTED)
    weight = torch.zeros(problem.layout.total)
    weight[WEIGHTED] = torch.cat([torch.tensor([0.0, 1e-6, 100.0, 3.0]), torch.rand(len(WEIGHTED) - 4) * 5])
    check_forward(problem, *draw(problem, 2, 1, head_dim, dtype), weight, tiles=PARTS)


def test_a_listed_key_that_a_tile_does_not_see_is_not_read():
    problem = pose("frame_causal", [[(33, 1)] * 3], weighted_keys=[33, 67, 101])
    q, k, v = draw(problem)
    weight = torch.zeros(problem.layout.total)
    weight[[33, 67, 101]] = 2.0
    want, _ = forward(problem, q, k, v, weight)
    k[67:], v[67:] = float("nan"), float("nan")
    assert torch.equal(forward(problem, q, k, v, weight)[0][:32], want[:32])


@pytest.mark.skipif(DEVICE == "cuda", reason="values are looked at on the CPU alone")
def test_weights_that_the_layout_does_not_list():
    layout = SequenceLayout([[(4, 1)]], "frame_causal", device=DEVICE, weighted_keys=[4])
    q = torch.ones(5, 1, 8, device=DEVICE)
    for at, value in ((3, 1.0), (4, -1.0)):
        weight = torch.zeros(5, device=DEVICE)
        weight[at] = value
        with flexkernels.backend("triton"), pytest.raises(ValueError, match="key_log_weight must be 0 but at"):
            flexkernels.attention(q, q, q, layout, key_log_weight=weight)


def test_rows_beyond_the_layout():
    problem = pose("frame_causal")
    q, k, v = draw(problem, extra=3)
    k[problem.layout.total :] = float("nan")
    got = through_the_op(problem, q, k, v, grad=torch.ones(q.shape, device=DEVICE))
    for x in got:
        assert torch.isfinite(x).all() and (x[problem.layout.total :] == 0).all()


def test_no_tokens():
    problem = pose("causal", [[], []])
    q, k, v = draw(problem)
    out, lse = forward(problem, q, k, v)
    assert out.shape == q.shape
    backward(problem, out, q, k, v, out, lse)


@pytest.mark.parametrize("tiles", [SMALL, pytest.param(DESCRIBED, marks=with_descriptors)], ids=["pointers", "tma"])
def test_a_neighbour_of_nan(tiles):
    """NaN in one sequence stays in it, where tiles of both are steps of one kernel."""
    problem = pose("full", [[(20, 0)], [(30, 0)]])
    q, k, v = draw(problem)
    want = forward(problem, q, k, v, tiles=tiles)[0]
    k[20:], v[20:] = float("nan"), float("nan")
    assert torch.equal(forward(problem, q, k, v, tiles=tiles)[0][:20], want[:20])


def test_large_logits():
    """Logits of +-1e4: the running maximum keeps exponentials in range; rows far below others stay right."""
    problem = pose("frame_causal_prefix")
    q, k, v = draw(problem)
    check_forward(problem, 100 * q, 100 * k, v)

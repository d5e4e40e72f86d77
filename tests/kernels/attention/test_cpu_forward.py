"""The C++ kernel of attention: every mask, dtype, tile size and ISA level against PyTorch, and what its op refuses."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import assert_accurate, repeat_at_level

from flexkernels import SequenceLayout, _native, attention_ref
from flexkernels.layout import MASKS, LayoutTensors, plan

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")

ops = torch.ops.flexkernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
# rows of a tile, keys of a step
BLOCKS = ((64, 64), (16, 16), (128, 64), (16, 128), (1, 7), (1000, 1000))
CROSS = (
    {"prefix_to_register": "none", "register_to_prefix": "none", "register_to_register": "causal"},
    {"prefix_to_prefix": "none", "register_to_register": "none"},
)
LAYOUTS = {name: (name, None) for name in MASKS} | {
    f"cross{i}": ("frame_causal_prefix", cross) for i, cross in enumerate(CROSS)
}
# ragged and empty frames and sequences, frames without prefix or registers, tiles that straddle frames
FRAMES = [[(7, 5), (3, 0), (0, 0), (0, 4)], [], [(1, 0)], [(65, 33), (1, 70), (64, 0)], [(129, 17)], [(4, 3)] * 2]
# longer than a block of keys, and not a multiple of anything
LONG = [[(151, 140)] * 2]


def make_layout(name, frames=FRAMES):
    mask, cross = LAYOUTS[name]
    return SequenceLayout(frames, mask, cross)


def draw(layout, heads=2, kv_heads=2, head_dim=64, dtype=torch.float32, extra=0):
    shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim))
    return tuple(torch.randn(layout.total + extra, *shape).to(dtype) for shape in shapes)


def planned(layout, blocks):
    made = plan(layout.queries, layout.keys, MASKS.index(layout.mask), layout.cross, *blocks)
    return list(layout.tensors[:6]) + [torch.from_numpy(part) for part in made] + [layout.tensors.weighted]


def forward(q, k, v, layout, blocks=(64, 64), weight=None, scale=None, **replaced):
    """out, and lse [rows, heads]; `replaced`: tensors of the layout, mask or cross."""
    tensors = planned(layout, blocks)
    for name in set(replaced) & set(LayoutTensors._fields):
        tensors[LayoutTensors._fields.index(name)] = replaced[name]
    mask, cross = replaced.get("mask", MASKS.index(layout.mask)), replaced.get("cross", layout.cross)
    out, lse = ops.attention(q, k, v, tensors, weight, mask, cross, scale)
    return out, lse.T


def check(q, k, v, layout, blocks=(64, 64), weight=None, scale=None):
    out, lse = forward(q, k, v, layout, blocks, weight, scale)
    options = dict(key_log_weight=weight, softmax_scale=scale, return_lse=True)
    exact, exact_lse = attention_ref(q.double(), k.double(), v.double(), layout, **options)
    formula, formula_lse = attention_ref(q, k, v, layout, **options)
    assert_accurate(out, formula, exact)
    seen = exact_lse.isfinite()
    assert torch.equal(lse[~seen], torch.full_like(lse[~seen], -math.inf))
    # the bfloat16 kernel counts in powers of two, and its probabilities are good to 3e-6
    spare = 1e-5 + 1e-7 * exact_lse[seen].abs().max() if q.dtype == torch.bfloat16 else 2e-6
    error = (lse - exact_lse)[seen].abs().max()
    assert error <= 2 * (formula_lse - exact_lse)[seen].abs().max() + spare, error
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernel_masks(name, dtype):
    for frames in (FRAMES, LONG):
        layout = make_layout(name, frames)
        check(*draw(layout, heads=1, kv_heads=1, dtype=dtype), layout)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", ["causal", "frame_causal", "frame_causal_prefix", "cross0"])
def test_kernel_tile_sizes(name, blocks):
    for frames in (FRAMES, LONG):
        layout = make_layout(name, frames)
        check(*draw(layout, heads=1, kv_heads=1, head_dim=32), layout, blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 17, 32, 64, 80, 128, 255, 256])
def test_kernel_head_dims(head_dim, dtype):
    layout = make_layout("frame_causal_prefix")
    check(*draw(layout, head_dim=head_dim, dtype=dtype), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "frame_causal", "cross0"])
def test_kernel_views_of_a_merged_projection(name, dtype):
    """Grouped heads read from one [rows, (heads + 2 kv_heads) * head_dim] tensor, and from transposed heads."""
    heads, kv_heads, head_dim = 4, 2, 40
    layout = make_layout(name)
    qkv = torch.randn(layout.total, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    out = check(q, k, v, layout)
    assert torch.equal(out, forward(q.contiguous(), k.contiguous(), v.contiguous(), layout)[0])
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(out, forward(*by_head, layout)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
def test_kernel_key_weights(spread, dtype):
    layout = make_layout("frame_causal")
    weight = spread * torch.randn(layout.total)
    check(*draw(layout, dtype=dtype), layout, weight=weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_a_weighted_key_counts_as_many(dtype):
    q, k, v = (torch.randn(40, 1, 32).to(dtype) for _ in range(3))
    copies = torch.tensor([1] * 39 + [30])
    few, many = SequenceLayout.from_lengths([40]), SequenceLayout.from_lengths([int(copies.sum())])
    out, lse = forward(q, k, v, few, weight=copies.float().log())
    want, want_lse = forward(*(x.repeat_interleave(copies, 0) for x in (q, k, v)), many)
    last = copies.cumsum(0) - 1
    torch.testing.assert_close(out, want[last], rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
    torch.testing.assert_close(lse, want_lse[last], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0, 5.0])
def test_kernel_scales(scale, dtype):
    layout = make_layout("frame_causal_prefix")
    check(*draw(layout, head_dim=20, dtype=dtype), layout, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_large_logits_stay_finite(dtype):
    layout = make_layout("causal")
    q, k, v = draw(layout, dtype=dtype)
    check(100 * q, k, v, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_rows_of_no_sequence(dtype):
    """Rows past the last sequence: out 0, lse -inf."""
    layout = make_layout("full")
    out, lse = forward(*draw(layout, dtype=dtype, extra=3), layout)
    assert (out[layout.total :] == 0).all() and (lse[layout.total :] == -math.inf).all()
    assert out[: layout.total].isfinite().all()


def test_kernel_nothing_to_do():
    for frames in ([], [[]], [[(0, 0)], []]):
        layout = make_layout("frame_causal", frames)
        out, lse = forward(*draw(layout), layout)
        assert out.shape == (0, 2, 64) and lse.shape == (0, 2)
        out, lse = forward(*draw(layout, extra=2), layout)
        assert (out == 0).all() and (lse == -math.inf).all()
    layout = make_layout("full", [[(3, 0)]])
    out, _ = forward(torch.empty(3, 0, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8), layout)
    assert out.shape == (3, 0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("block", [16, 64])
def test_kernel_queries_and_keys_of_other_lengths(block, mask, dtype):
    """Causal aligns the last query with the last key; queries before the first key see nothing."""
    q_lengths, k_lengths = [5, 100, 33, 0, 9, 40], [130, 100, 70, 4, 0, 17]
    queries, keys = (SequenceLayout.from_lengths(n, mask) for n in (q_lengths, k_lengths))
    q_bounds, k_bounds = queries.cu_seqlens.tolist(), keys.cu_seqlens.tolist()
    seen = torch.zeros(queries.total, keys.total, dtype=torch.bool)
    for q0, q1, k0, k1 in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        ones = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        seen[q0:q1, k0:k1] = ones if mask == "full" else ones.tril((k1 - k0) - (q1 - q0))
    q = torch.randn(queries.total, 2, 24).to(dtype)
    k, v = torch.randn(2, keys.total, 2, 24).to(dtype)

    def dense(wide):
        scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * 24**-0.5
        p = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
        return torch.einsum("hqk,khd->qhd", p, v.to(wide))

    layout = SequenceLayout.from_lengths(q_lengths, mask, key_lengths=k_lengths)
    out, lse = forward(q, k, v, layout, (block, block))
    assert_accurate(out, dense(torch.float32).to(dtype), dense(torch.float64))
    blind = ~seen.any(1)
    assert blind.any() and (out[blind] == 0).all() and (lse[blind] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_hidden_keys_do_not_leak(dtype):
    """What a query must not see changes no bit of its row, and nothing beyond the sequences is read."""
    layout = make_layout("frame_causal_prefix")
    q, k, v = draw(layout, dtype=dtype, extra=40)
    k[layout.total :], v[layout.total :] = math.nan, math.nan
    out, _ = forward(q, k, v, layout)
    assert out.isfinite().all()
    key = int(layout.cu_seqlens[3]) + 70
    k[key], v[key] = -k[key], 50
    changed = (forward(q, k, v, layout)[0] != out).flatten(1).any(1)
    assert torch.equal(changed[: layout.total], layout.visible()[:, key])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_same_bits(dtype):
    """Whatever the number of threads, the neighbours of a sequence or the run."""
    layout = make_layout("frame_causal_prefix")
    q, k, v = draw(layout, heads=4, kv_heads=2, dtype=dtype)
    weight = torch.randn(layout.total)
    want = forward(q, k, v, layout, weight=weight)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            got = forward(q, k, v, layout, weight=weight)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    finally:
        torch.set_num_threads(threads)
    bounds = layout.cu_seqlens.tolist()
    for (begin, end), frames in zip(pairwise(bounds), FRAMES, strict=True):
        alone = make_layout("frame_causal_prefix", [frames])
        rows = slice(begin, end)
        got = forward(q[rows], k[rows], v[rows], alone, weight=weight[rows])
        assert torch.equal(got[0], want[0][rows]) and torch.equal(got[1], want[1][rows])


SMALL = SequenceLayout([[(20, 0)], [(10, 0)]], "full")
X = torch.zeros(30, 2, 8)


def as_ints(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def tiles(*rows):
    return as_ints(*([*row, 0, 0, 0, 0, 0] for row in rows))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (dict(q=X.double()), "q must have dtype float32, bfloat16 or float16, got Double"),
        (dict(k=X.half()), "k must have dtype Float, got Half"),
        (dict(q=X[:, 0]), "q must have 3 dimensions, got 2"),
        (dict(v=X[:, :, :7]), "v must have head_dim 8 like q, got 7"),
        (dict(v=X[:29]), "v must have k's 30 rows and 2 heads, got 29 and 2"),
        (dict(k=X[:, :0], v=X[:, :0]), "q must have a multiple of k's 0 heads, got 2"),
        (dict(cu_seqlens=as_ints(0, 20)), "cu_seqlens must end with its 30 frames"),
        (dict(cu_seqlens_k=as_ints(0, 30)), "cu_seqlens_k must have at least 3 elements, got 2"),
        (dict(cu_seqlens_k=as_ints(0, 25, 20)), "cu_seqlens_k must not fall, got 25 before 20"),
        (dict(cu_seqlens=as_ints(1, 20, 30)), "cu_seqlens must start at 0, got 1"),
        (dict(cu_seqlens=as_ints(0, 20, 31)), "cu_seqlens must end with its 30 frames, within the 30 rows, got 31"),
        (dict(q=X[:29]), "cu_seqlens must end with its 30 frames, within the 29 rows, got 30"),
        (dict(frame_k=SMALL.frame[:29], rank_k=SMALL.rank[:29]), "cu_seqlens_k must end with its 29 frames"),
        (dict(rank=SMALL.rank[:29]), "rank must have at least 30 elements, got 29"),
        (dict(reach=SMALL.tensors.reach[:29]), "reach must have 30 elements, got 29"),
        (dict(reach=SMALL.tensors.reach.long()), "reach must have dtype Int, got Long"),
        (dict(tiles=as_ints([0, 0, 20], [1, 20, 30])), "tiles must have size 8 in dimension 1, got 3"),
        (dict(tiles=tiles([0, 0, 20], [2, 20, 30])), "tiles must ascend among 2 sequences, got 2"),
        (dict(tiles=tiles([1, 0, 20], [0, 20, 30])), "rows must ascend inside their sequences, got 0 in sequence 1"),
        (dict(tiles=tiles([0, 0, 21], [1, 21, 30])), "rows must ascend inside their sequences, got 19 in sequence 0"),
        (dict(tiles=tiles([0, 0, 20], [1, 21, 30])), "tiles must have 1 to 64 rows, counted on from 20, got 21 to 30"),
        (dict(tiles=tiles([0, 0, 20], [1, 20, 90])), "tiles must have 1 to 64 rows, counted on from 20, got 20 to 90"),
        (dict(tiles=tiles([0, 0, 20], [1, 20, 29])), "tiles must hold all 30 rows, got 29"),
        (dict(rows=SMALL.tensors.rows + 30), "rows must ascend inside their sequences, got 30 in sequence 0"),
        (dict(rows=SMALL.tensors.rows[:1]), "rows must have size 2 in dimension 0, got 1"),
        (dict(runs=as_ints([0, 20, 1], [20, 31, 1])), "runs must lie inside .* got keys 20 to 31"),
        (dict(runs=as_ints([-1, 20, 1], [20, 30, 1])), "runs must lie inside .* got keys -1 to 20"),
        (dict(ptr=as_ints(0, 2, 1)), "ptr must run from 0 to 2, got 0 to 1"),
        (dict(ptr=as_ints(0, -1, 2)), "ptr must not fall, got 0 before -1"),
        (dict(ptr=as_ints(0, 2)), "ptr must have 3 elements, got 2"),
        (dict(weight=torch.zeros(29)), "key_log_weight must have 30 elements, got 29"),
        (dict(weight=torch.full((30,), math.inf)), "key_log_weight must be finite, got inf"),
        (dict(scale=math.nan), "softmax_scale must be finite, got nan"),
        (dict(mask=4), "mask must be 0, 1, 2 or 3, got 4"),
        (dict(cross=[1, 1, 1]), "cross must have 4 entries, got 3"),
        (dict(cross=[1, 1, 1, 3]), "cross must hold 0, 1 or 2, got 3"),
    ],
)  # fmt: skip
def test_refuses(replaced, message):
    given = {name: replaced.get(name, X) for name in "qkv"}
    with pytest.raises(RuntimeError, match=message):
        forward(*given.values(), SMALL, **{name: x for name, x in replaced.items() if name not in given})


def test_refuses_a_layout_of_fewer_tensors():
    with pytest.raises(RuntimeError, match="layout must hold 15 tensors, got 14"):
        ops.attention(X, X, X, list(SMALL.tensors)[:-1], None, 0, [1, 1, 1, 1], None)


def test_refuses_head_dim_257():
    with pytest.raises(RuntimeError, match="head_dim must lie between 1 and 256, got 257"):
        forward(*[torch.zeros(30, 1, 257)] * 3, SMALL)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_isa_level(level):
    """The kernel tests of this file once more, in a process that is held to `level`."""
    repeat_at_level(__file__, "test_kernel", level)

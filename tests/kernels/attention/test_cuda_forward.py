"""The CUDA kernel of attention, on a GPU or in the emulator: every mask, head_dim and tile size against float64."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import assert_accurate, emulated, on_cuda

import flexkernels
from flexkernels import SequenceLayout, attention_ref, library
from flexkernels.attention import _attention_backward_op as backward_op
from flexkernels.attention import _attention_op as op
from flexkernels.layout import MASKS, LayoutTensors, plan

pytestmark = on_cuda

DTYPES = (torch.bfloat16, torch.float16)
# rows of a tile, keys of a step: those of the planner, others of the tuning table, and what fits no block
BLOCKS = ((64, 64), (128, 64), (16, 16), (1, 7), (1000, 1000))
CROSS = (
    {"prefix_to_register": "none", "register_to_prefix": "none", "register_to_register": "causal"},
    {"prefix_to_prefix": "none", "register_to_register": "none"},
)
LAYOUTS = {name: (name, None) for name in MASKS} | {
    f"cross{i}": ("frame_causal_prefix", cross) for i, cross in enumerate(CROSS)
}
# ragged and empty frames and sequences, frames without prefix or registers, and parts of whole tiles and more
FRAMES = [[(7, 5), (3, 0), (0, 0), (0, 4)], [], [(1, 0)], [(65, 33), (1, 70)], [(4, 3)] * 2]
# keys of other sequences: more, none, and one frame of many
KEYS = [[(5, 6), (3, 1), (2, 2)], [(4, 4)], [], [(70, 3), (9, 80)], [(130, 8)]]


def make_layout(name, frames=FRAMES, key_frames=None):
    return SequenceLayout(frames, *LAYOUTS[name], key_frames=key_frames)


def draw(layout, heads=1, kv_heads=1, head_dim=64, dtype=torch.bfloat16, extra=0):
    shapes = ((layout.total, heads), (layout.total_k, kv_heads), (layout.total_k, kv_heads))
    return tuple(torch.randn(rows + extra, h, head_dim).to(dtype) for rows, h in shapes)


def arguments(place, layout, blocks=(64, 64), **replaced):
    """What the op takes of a layout; `replaced`: tensors of it."""
    sides, mask = (layout.queries, layout.keys), MASKS.index(layout.mask)
    tokens = [x for side in sides for x in side.tokens]
    planned = plan(*sides, mask, layout.cross, *blocks)
    made = dict(zip(LayoutTensors._fields, [*tokens, *planned, layout.tensors.weighted], strict=True))
    # copies, which the emulator knows of
    tensors = [torch.as_tensor(x).clone().to(place[1]) for x in (made | replaced).values()]
    return tensors, mask, list(layout.cross)


def forward(place, q, k, v, layout, blocks=(64, 64), weight=None, scale=None, **replaced):
    """out, and lse [rows, heads]."""
    tensors, *mask = arguments(place, layout, blocks, **replaced)
    # a copy of a view is no view: `to` leaves what is on the device already
    q, k, v, weight = (None if x is None else x.to(place[1]) for x in (q, k, v, weight))
    with flexkernels.backend("cuda"):
        out, lse = op(q, k, v, tensors, weight, *mask, scale)
    return out.cpu(), lse.T.cpu()


def check(place, q, k, v, layout, blocks=(64, 64), weight=None, scale=None):
    out, lse = forward(place, q, k, v, layout, blocks, weight, scale)
    options = dict(key_log_weight=weight, softmax_scale=scale, return_lse=True)
    exact, exact_lse = attention_ref(q.double(), k.double(), v.double(), layout, **options)
    formula, formula_lse = attention_ref(q, k, v, layout, **options)
    assert_accurate(out, formula, exact)
    seen = exact_lse.isfinite()
    assert torch.equal(lse[~seen], torch.full_like(lse[~seen], -math.inf)) and (out[~seen] == 0).all()
    if seen.any():
        allowed = 2 * (formula_lse - exact_lse)[seen].abs().max() + 2e-6 + 2e-7 * exact_lse[seen].abs().max()
        assert (lse - exact_lse)[seen].abs().max() <= allowed
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_masks(place, name, dtype):
    layout = make_layout(name)
    check(place, *draw(layout, dtype=dtype), layout)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", ["causal", "frame_causal_prefix", "cross0"])
def test_tile_sizes(place, name, blocks):
    layout = make_layout(name)
    check(place, *draw(layout, head_dim=16), layout, blocks)


@pytest.mark.parametrize("head_dim", [1, 16, 17, 32, 40, 64, 66, 80, 96, 128])
def test_head_dims(place, head_dim):
    layout = make_layout("frame_causal_prefix", FRAMES[2:])
    check(place, *draw(layout, head_dim=head_dim, dtype=torch.float16 if head_dim % 32 else torch.bfloat16), layout)


@pytest.mark.parametrize("length", [1, 17, 64, 65, 129, 151, 300])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_odd_lengths(place, mask, length):
    """Also sequences of more steps than are under way at a time."""
    layout = make_layout(mask, [[(length, 0)], [(3, 0)]])
    check(place, *draw(layout, head_dim=128 if length == 300 else 32), layout)


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_of_other_lengths(place, name):
    layout = make_layout(name, key_frames=KEYS)
    weight = torch.randn(layout.total_k)
    out, _ = check(place, *draw(layout, head_dim=40), layout, weight=weight)
    assert (out == 0).all(2).any()


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["frame_causal", "cross1"])
def test_key_weights(place, name, spread):
    layout = make_layout(name)
    weight = spread * torch.randn(layout.total)
    check(place, *draw(layout, dtype=torch.float16), layout, weight=weight)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0, 5.0])
def test_scales(place, scale):
    layout = make_layout("frame_causal_prefix", FRAMES[3:])
    check(place, *draw(layout, head_dim=24), layout, scale=scale)


def test_large_logits_stay_finite(place):
    layout = make_layout("causal")
    q, k, v = draw(layout)
    check(place, 100 * q, k, v, layout)


@pytest.mark.parametrize("head_dim", [40, 20])
@pytest.mark.parametrize("name", ["frame_causal", "cross0"])
def test_grouped_heads_of_a_merged_projection(place, name, head_dim):
    """Heads read from one [rows, (heads + 2 kv_heads) * head_dim] tensor, aligned or not, give the bits of copies."""
    heads, kv_heads = 4, 2
    layout = make_layout(name, FRAMES[:4])
    qkv = torch.randn(layout.total, heads + 2 * kv_heads, head_dim).bfloat16()
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    out, lse = check(place, q, k, v, layout)
    # one element further, on no boundary of 16 bytes; heads side by side; elements side by side
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    by_element = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for views in ([x.contiguous() for x in (q, k, v)], shifted, by_head, by_element):
        again = forward(place, *views, layout)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_one_tensor_as_q_k_and_v(place):
    layout = make_layout("causal", FRAMES[2:])
    x = draw(layout)[0]
    check(place, x, x, x, layout)


@pytest.mark.parametrize("name", ["full", "cross0"])
def test_rows_of_no_sequence(place, name):
    """Rows past the last sequence: out 0, lse -inf; what lies there is not read, in no dimension."""
    layout = make_layout(name, FRAMES[:4])
    q, k, v = draw(layout, heads=3, head_dim=20, extra=70)
    k[layout.total :], v[layout.total :] = math.nan, math.nan
    out, lse = forward(place, q, k, v, layout)
    assert (out[layout.total :] == 0).all() and (lse[layout.total :] == -math.inf).all()
    assert out.isfinite().all()


def test_nothing_to_do(place):
    for frames in ([], [[]], [[(0, 0)], []]):
        layout = make_layout("frame_causal", frames)
        for extra in (0, 2):
            out, lse = forward(place, *draw(layout, extra=extra), layout)
            assert out.shape == (extra, 1, 64) and (out == 0).all() and (lse == -math.inf).all()
    layout = make_layout("full", [[(3, 0)]])
    out, lse = forward(place, *(torch.ones(3, h, 8).bfloat16() for h in (0, 1, 1)), layout)
    assert out.shape == (3, 0, 8) and lse.shape == (3, 0)
    out, _ = forward(place, *draw(make_layout("full", [[(3, 0)]], [[]])), make_layout("full", [[(3, 0)]], [[]]))
    assert (out == 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_neighbours_and_hidden_keys_change_no_bit(place, name):
    """A sequence alone, beside others and beside NaN; and a row whatever the keys are that it does not see."""
    layout = make_layout(name)
    q, k, v = draw(layout, heads=2)
    weight = torch.randn(layout.total)
    out, lse = forward(place, q, k, v, layout, weight=weight)
    again = forward(place, q, k, v, layout, weight=weight)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    bounds = layout.cu_seqlens.tolist()
    for (begin, end), frames in zip(pairwise(bounds), FRAMES, strict=True):
        rows = slice(begin, end)
        alone = forward(place, q[rows], k[rows], v[rows], make_layout(name, [frames]), weight=weight[rows])
        assert torch.equal(alone[0], out[rows]) and torch.equal(alone[1], lse[rows])
    others = torch.ones(layout.total, dtype=torch.bool)
    others[bounds[3] : bounds[4]] = False
    wild_k, wild_v = (x.masked_fill(others[:, None, None], math.nan) for x in (k, v))
    beside = forward(place, q, wild_k, wild_v, layout, weight=weight)
    assert torch.equal(beside[0][~others], out[~others]) and torch.equal(beside[1][~others], lse[~others])
    key = bounds[3] + 70
    k[key], v[key] = -k[key], 50
    changed = (forward(place, q, k, v, layout, weight=weight)[0] != out).flatten(1).any(1)
    assert torch.equal(changed, layout.visible()[:, key])


def test_bits_of_a_row_do_not_depend_on_its_tile(place):
    """Without switches: which rows it stands among, and whether a step is masked for their sake."""
    layout = make_layout("frame_causal_prefix")
    tensors = draw(layout)
    out, lse = forward(place, *tensors, layout)
    for rows in (1, 16, 128):
        again = forward(place, *tensors, layout, (rows, 64))
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_any_order_of_warps_and_blocks(place):
    if not emulated(place):
        pytest.skip("the order is the emulator's to choose")
    from emulator import load_ops

    layout = make_layout("cross0")
    tensors = draw(layout, heads=2)
    want = forward(place, *tensors, layout)
    try:
        for seed in (1, 2):
            load_ops().seed(seed)
            got = forward(place, *tensors, layout)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    finally:
        load_ops().seed(0)


def test_what_the_kernel_does_not_serve(place):
    layout = make_layout("full", [[(3, 0)]])
    for head_dim, dtype, reason in (
        (64, torch.float32, "cuda: its kernel takes bfloat16 and float16, not float32"),
        (129, torch.bfloat16, "cuda: its kernel takes head_dim up to 128, not 129"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            forward(place, *draw(layout, head_dim=head_dim, dtype=dtype), layout)
    tensors, *mask = arguments(place, layout)
    q, k, v = (x.to(place[1]) for x in draw(layout))
    lse = torch.zeros(1, 3, device=place[1])
    with flexkernels.backend("cuda"), pytest.raises(RuntimeError, match="cuda: it has no attention_backward"):
        backward_op(q, q, k, v, q, lse, tensors, None, *mask, None)


def native(place):
    return getattr(torch.ops, library.emulated if emulated(place) else library.NAMESPACE).attention


SMALL = SequenceLayout([[(20, 0)], [(10, 0)]], "full")
X = torch.zeros(30, 2, 8, dtype=torch.bfloat16)
WEIGHT = torch.zeros(30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(q=X.double()), "q must have dtype float32, bfloat16 or float16, got Double"),
        (dict(q=X.float(), k=X.float(), v=X.float()), "q must have dtype bfloat16 or float16 for the CUDA kernel"),
        (dict(k=X.half()), "k must have dtype BFloat16, got Half"),
        (dict(q=X[:29]), "q and k must have at least the layout's 30 and 30 rows, got 29 and 30"),
        (dict(v=X[:29]), "v must have k's 30 rows and 2 heads, got 29 and 2"),
        (dict(weight=WEIGHT[1:]), "key_log_weight must have 30 elements, got 29"),
        (dict(rows=SMALL.tensors.rows[:1]), "rows must have size 2 in dimension 0, got 1"),
        (dict(reach=SMALL.tensors.reach[1:]), "reach must have 30 elements, got 29"),
    ],
)
def test_the_op_refuses_shapes(place, given, message):
    own = dict(q=X, k=X, v=X, weight=WEIGHT)
    tensors, *mask = arguments(place, SMALL, **{name: x for name, x in given.items() if name not in own})
    q, k, v, weight = ((own | given)[name].to(place[1]) for name in own)
    with pytest.raises(RuntimeError, match=message):
        native(place)(q, k, v, tensors, weight, *mask, None)


def test_the_op_looks_at_values_only_when_asked(place, monkeypatch):
    q = X.to(place[1])
    tensors, *mask = arguments(place, SMALL)
    # not what the kernel reads
    tensors[LayoutTensors._fields.index("cu_seqlens")] += 1
    wild = torch.full((30,), math.nan, device=place[1])
    out, _ = native(place)(q, q, q, tensors, None, *mask, None)
    assert (out == 0).all()
    monkeypatch.setenv("FLEXKERNELS_CHECK", "1")
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, got 1"):
        native(place)(q, q, q, tensors, None, *mask, None)
    with pytest.raises(RuntimeError, match="key_log_weight must be finite, got nan"):
        native(place)(q, q, q, arguments(place, SMALL)[0], wild, *mask, None)


def test_auto_takes_triton_first(place):
    assert op.orders["cuda"] == ("triton", "cuda", "reference")

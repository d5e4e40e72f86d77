"""SequenceLayout: masks against their definitions and the published dense masks, and the planner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TOKENIZERS
from safetensors.torch import load_file

import flexkernels
from flexkernels import SequenceLayout, _native
from flexkernels.layout import CROSS_FRAME, MASKS, TilePlan, plan_ref, switched

lengths = st.integers(0, 5)
sequences = st.lists(st.tuples(lengths, lengths), max_size=4)
batches = st.lists(sequences, max_size=4)


@st.composite
def layouts(draw):
    mask = draw(st.sampled_from(MASKS))
    cross = {}
    if mask == "frame_causal_prefix":
        for name in CROSS_FRAME:
            values = ("full", "none", "causal") if name == "register_to_register" else ("full", "none")
            cross[name] = draw(st.sampled_from(values))
    frames = draw(batches)
    keys = [draw(sequences) for _ in frames] if draw(st.booleans()) else None
    return SequenceLayout(frames, mask, cross, key_frames=keys), cross


def sees(layout, cross, q, k):
    """The definitions, token by token."""
    sequence, t = int(layout.sequence[q]), layout.tensors
    if not t.cu_seqlens_k[sequence] <= k < t.cu_seqlens_k[sequence + 1]:
        return False
    frame_q, frame_k = int(t.frame[q]), int(t.frame_k[k])
    rank_q, rank_k = int(t.rank[q]), int(t.rank_k[k])
    if layout.mask == "full":
        return True
    if layout.mask == "causal":
        return t.cu_seqlens_k[sequence + 1] - k >= t.cu_seqlens[sequence + 1] - q
    if layout.mask == "frame_causal":
        return frame_k <= frame_q
    if frame_q == frame_k:
        return rank_k == -1 or (rank_q >= 0 and rank_k <= rank_q)
    if frame_k > frame_q:
        return False
    part = {True: "prefix", False: "register"}
    switch = cross[f"{part[rank_q < 0]}_to_{part[rank_k < 0]}"]
    return switch == "full" or (switch == "causal" and rank_k <= rank_q)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_visible_is_the_definition(case):
    layout, cross = case
    dense = layout.visible()
    assert dense.shape == (layout.total, layout.total_k)
    for q in range(layout.total):
        for k in range(layout.total_k):
            assert bool(dense[q, k]) == sees(layout, cross, q, k), (q, k)


@pytest.mark.parametrize(("name", "mask"), [("enc_mask", "frame_causal_prefix"), ("dec_mask", "frame_causal")])
def test_published_masks(name, mask):
    want = load_file(TOKENIZERS / "base" / "debug.safetensors")[name].bool()
    assert torch.equal(SequenceLayout([[(16, 16)] * 5], mask).visible(), want)


def test_metadata():
    layout = SequenceLayout([[(2, 1), (1, 2)], [], [(0, 3)]], "frame_causal")
    assert layout.cu_seqlens.tolist() == [0, 6, 6, 9]
    assert layout.frame.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert layout.rank.tolist() == [-1, -1, 0, -1, 0, 1, 0, 1, 2]
    assert (layout.total, layout.batch, layout.max_seqlen) == (9, 3, 6)
    assert SequenceLayout([], "full").total == 0


def check_runs(seen, tiles, ptr, runs, rows_of, sequence, step, switched):
    """Every seen pair lies in exactly one run, no run is unseen, flags, counts and columns are exact.

    seen: bool [rows, columns]; sequence: that of each row; rows_of: the rows of tile i."""
    covered = np.zeros(seen.shape, dtype=int)
    for i, (owner, first, end, full_runs, begin, middle, last, _) in enumerate(tiles):
        rows, found = rows_of(i), runs[ptr[i] : ptr[i + 1]]
        assert len(rows) == end - first and (sequence[rows] == owner).all()
        assert found[:, 2].tolist() == [1] * full_runs + [0] * (len(found) - full_runs)
        for c0, c1, full in found:
            part = seen[rows, c0:c1]
            assert c1 > c0 and part.any() and full == part.all()
            assert not full or switched or len(found) == 1 or (c1 - c0) % step == 0
            covered[rows, c0:c1] += 1
        if not switched:
            assert begin <= middle <= last
            assert sorted(found[:, :2].tolist()) == [[a, b] for a, b in ((begin, middle), (middle, last)) if a < b]
    assert covered.max(initial=0) <= 1
    assert not (seen & (covered == 0)).any()


def check_plan(layout, plan, rows, step):
    seen, by_pairs = layout.visible().numpy(), switched(MASKS.index(layout.mask), layout.cross)
    q_sequence, k_sequence = (
        np.repeat(np.arange(layout.batch), np.diff(side.cu_seqlens)) for side in (layout.queries, layout.keys)
    )
    counts = plan.tiles[:, 2] - plan.tiles[:, 1]
    bounds = [0, *np.cumsum(counts).tolist()]
    assert plan.tiles[:, 1].tolist() == bounds[:-1] and plan.tiles[:, 2].tolist() == bounds[1:]
    listed = [tile[:count] for tile, count in zip(plan.rows, counts, strict=True)]
    assert sorted(np.concatenate([[], *listed]).tolist()) == list(range(layout.total))
    for tile, own in zip(plan.rows, listed, strict=True):
        assert len(tile) == rows and len(own) >= 1 and (np.diff(own) > 0).all() and (tile[len(own) :] == own[-1]).all()
    check_runs(seen, plan.tiles, plan.ptr, plan.runs, listed.__getitem__, q_sequence, step, by_pairs)

    key_tiles = plan.key_tiles
    keys_of = lambda i: np.arange(key_tiles[i, 1], key_tiles[i, 2])  # noqa: E731
    assert np.concatenate([[], *map(keys_of, range(len(key_tiles)))]).tolist() == list(range(layout.total_k))
    assert (key_tiles[:, 2] - key_tiles[:, 1] <= step).all()
    check_runs(seen.T, key_tiles, plan.key_ptr, plan.key_runs, keys_of, k_sequence, step, by_pairs)

    if by_pairs:
        assert plan.reach.shape == (0,)
    for row, reach in enumerate(plan.reach):
        first = layout.keys.cu_seqlens[q_sequence[row]]
        assert seen[row].nonzero()[0].tolist() == list(range(first, reach))


@pytest.mark.parametrize("planner", ["native", "reference"])
@settings(max_examples=150, deadline=None)
@given(case=layouts(), rows=st.sampled_from([1, 3, 4]), step=st.sampled_from([1, 2, 5]))
def test_plan(planner, case, rows, step):
    layout, _ = case
    mask, cross = MASKS.index(layout.mask), np.array(layout.cross, dtype=np.int32)
    given = (layout.queries.lengths, layout.keys.lengths, mask, cross, rows, step)
    plan = TilePlan(*plan_ref(*given))
    if planner == "native":
        if _native.C is None:
            pytest.skip(f"no C++ planner: {_native.cpu_unavailable}")
        reference, plan = plan, TilePlan(*_native.plan(*given))
        for name, ours, want in zip(TilePlan._fields, plan, reference, strict=True):
            assert ours.dtype == want.dtype == np.int32 and np.array_equal(ours, want), name
    check_plan(layout, plan, rows, step)


def visited(tiles, ptr, runs, rows, step):
    """Pairs that whole tiles of `rows` and steps visit."""
    steps = -(-(runs[:, 1] - runs[:, 0]) // step)
    return sum(rows * step * int(steps[ptr[i] : ptr[i + 1]].sum()) for i in range(len(tiles)))


@pytest.mark.parametrize(("frames", "allowed"), [((256, 256), 1.012), ((256, 33), 1.15)], ids=["full", "collapsed"])
@pytest.mark.parametrize("mask", ["frame_causal_prefix", "frame_causal"])
def test_planner_visits_few_pairs_beyond_the_seen(mask, frames, allowed):
    """The released encoder and decoder shapes: pairs visited over pairs seen."""
    layout = SequenceLayout([[frames] * 5], mask)
    seen, t = int(layout.visible().sum()), [x.numpy() for x in layout.tensors]
    assert visited(*t[8:11], 64, 64) <= allowed * seen
    # tiles of keys do not start at frame parts
    assert visited(*t[11:14], 64, 64) <= (allowed + 0.1) * seen


def test_a_layout_is_made_once():
    frames = [[(4, 3)] * 2, [(1, 1)]]
    first = SequenceLayout.cached(frames, "frame_causal")
    assert SequenceLayout.cached([list(s) for s in frames], "frame_causal", device="cpu") is first
    assert SequenceLayout.cached(frames, "frame_causal_prefix") is not first
    switched = SequenceLayout.cached(frames, "frame_causal_prefix", {"prefix_to_register": "none"})
    assert switched.cross == (1, 0, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[(1, 1)]], "diagonal"), "mask must be one of"),
        (([[(1, -1)]], "full"), "non-negative"),
        (([[(1, 1)]], "full", {"prefix_to_prefix": "none"}), "needs mask"),
        (([[(1, 1)]], "frame_causal_prefix", {"prefix_to_prefix": "causal"}), "must be one of none, full, got"),
        (([[(1, 1)]], "frame_causal_prefix", {"a_to_b": "full"}), "keys must be among"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout(*arguments)


def test_weighted_keys_stand_by_sequence():
    frames = [[(20, 3)], [], [(1, 0)]]
    layout = SequenceLayout.cached(frames, weighted_keys=[0, *range(2, 20), 23])
    assert layout is SequenceLayout.cached(frames, weighted_keys=[0, *range(2, 20), 23])
    none = [2**31 - 1]
    assert layout.tensors.weighted.tolist() == [[0, *range(2, 20), *13 * none], 32 * none, [23, *31 * none]]
    # none at all is not any
    assert SequenceLayout(frames, weighted_keys=[]).tensors.weighted.tolist() == 3 * [16 * none]
    assert SequenceLayout(frames).tensors.weighted.shape == (3, 0)
    other = SequenceLayout(frames, key_frames=[[(1, 1)], [(2, 0)], []], weighted_keys=[1, 3])
    assert other.tensors.weighted[:, 0].tolist() == [1, 3, *none]
    for wrong in ([3, 3], [5, 4], [-1], [24]):
        with pytest.raises(ValueError, match="weighted_keys must rise within the 24 keys, got"):
            SequenceLayout(frames, weighted_keys=wrong)


def test_wrong_number_of_key_sequences():
    with pytest.raises(ValueError, match="key_frames must have 1 sequences like frames, got 2"):
        SequenceLayout([[(1, 1)]], "full", key_frames=[[(1, 1)], []])


def test_a_device_has_its_index():
    """A device named without one, or with one where tensors have none, is that of tensors made there."""
    layout = SequenceLayout([[(3, 1)]], device="cpu:0")
    q = torch.randn(4, 1, 8, device="cpu:0")
    assert layout.device == q.device == layout.frame.device
    assert flexkernels.attention(q, q, q, layout).shape == q.shape
    assert SequenceLayout.cached([[(3, 1)]], device="cpu:0") is SequenceLayout.cached([[(3, 1)]], device="cpu")

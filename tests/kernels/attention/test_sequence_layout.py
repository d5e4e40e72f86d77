"""SequenceLayout: masks against their definitions and the published dense masks, and the planner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TOKENIZERS
from safetensors.torch import load_file

from flexkernels import SequenceLayout, _native
from flexkernels.layout import CROSS_FRAME, MASKS, TilePlan, plan_ref

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


def check_plan(dense, sequence, plan, block_row, block_column):
    """Every seen pair lies in exactly one run, no tile of a run sees nothing, flags and counts are exact."""
    covered, rows = np.zeros(dense.shape, dtype=int), np.zeros(len(dense), dtype=int)
    for i, (owner, r0, r1, full_runs) in enumerate(plan.tiles):
        rows[r0:r1] += 1
        assert (sequence[r0:r1] == owner).all()
        assert r1 > r0 and (block_row == 0 or r1 - r0 <= block_row)
        runs = plan.runs[plan.ptr[i] : plan.ptr[i + 1]]
        assert runs[:, 2].tolist() == [1] * full_runs + [0] * (len(runs) - full_runs)
        for c0, c1, full in runs:
            assert c1 > c0
            for c in range(c0, c1, block_column or c1 - c0):
                part = dense[r0:r1, c : min(c + block_column, c1) if block_column else c1]
                assert part.any()
                assert full == part.all() or (block_column == 0 and not full)
            covered[r0:r1, c0:c1] += 1
    assert (rows == 1).all()
    assert covered.max(initial=0) <= 1
    assert not (dense & (covered == 0)).any()


@pytest.mark.parametrize("planner", ["native", "reference"])
@settings(max_examples=80, deadline=None)
@given(
    case=layouts(), block_q=st.sampled_from([0, 1, 3, 4]), block_k=st.sampled_from([0, 1, 2, 5]),
    transposed=st.booleans(),
)  # fmt: skip
def test_plan(planner, case, block_q, block_k, transposed):
    layout, _ = case
    if planner == "native":
        if _native.C is None:
            pytest.skip(f"no C++ planner: {_native.cpu_unavailable}")
        plan = layout.plan(block_q, block_k, transposed)
    else:
        mask, cross = MASKS.index(layout.mask), np.array(layout.cross)
        sides = (layout.queries.lengths, layout.keys.lengths)
        plan = TilePlan(*plan_ref(*sides, mask, cross, block_q, block_k, transposed))
    dense = layout.visible().numpy()
    if transposed:
        check_plan(dense.T, layout.keys.sequence().numpy(), plan, block_k, block_q)
    else:
        check_plan(dense, layout.sequence.numpy(), plan, block_q, block_k)


def tiles_of(plan, block_row, block_column):
    """The tiles that a plan visits."""
    spans = plan.runs[:, 1] - plan.runs[:, 0]
    return int(-(-spans // block_column).sum())


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("frames", [(256, 256), (256, 33)], ids=["full", "collapsed"])
@pytest.mark.parametrize("mask", ["frame_causal_prefix", "frame_causal"])
def test_planner_visits_few_tiles_beyond_the_needed(mask, frames, block):
    """The released encoder and decoder shapes: tiles visited over tiles in which anything is seen."""
    layout = SequenceLayout([[frames] * 5], mask)
    dense, tiles = layout.visible().numpy(), range(0, layout.total, block)
    needed = sum(bool(dense[i : i + block, j : j + block].any()) for i in tiles for j in tiles)
    assert tiles_of(layout.plan(block, block), block, block) <= 1.15 * needed
    assert tiles_of(layout.plan(block, block, transposed=True), block, block) <= 1.15 * needed


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


def test_wrong_number_of_key_sequences():
    with pytest.raises(ValueError, match="key_frames must have 1 sequences like frames, got 2"):
        SequenceLayout([[(1, 1)]], "full", key_frames=[[(1, 1)], []])


def test_wrong_tile_size():
    with pytest.raises(ValueError, match="must be >= 0"):
        SequenceLayout([[(1, 1)]], "full").plan(-1, 16)

"""SequenceLayout: masks against their definitions and the published dense masks, and the planner."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flexkernels import SequenceLayout, _native
from flexkernels.layout import CROSS_FRAME, MASKS, plan_ref

DATA = Path(__file__).parent / "data" / "tokenizer"
lengths = st.integers(0, 5)
batches = st.lists(st.lists(st.tuples(lengths, lengths), max_size=4), max_size=4)


@st.composite
def layouts(draw):
    mask = draw(st.sampled_from(MASKS))
    cross = {}
    if mask == "frame_causal_prefix":
        for name in CROSS_FRAME:
            values = ("full", "none", "causal") if name == "register_to_register" else ("full", "none")
            cross[name] = draw(st.sampled_from(values))
    return SequenceLayout(draw(batches), mask, cross), cross


def sees(layout, cross, q, k):
    """The definitions, token by token."""
    if layout.sequence[q] != layout.sequence[k]:
        return False
    frame_q, frame_k = int(layout.frame[q]), int(layout.frame[k])
    rank_q, rank_k = int(layout.rank[q]), int(layout.rank[k])
    if layout.mask == "full":
        return True
    if layout.mask == "causal":
        return k <= q
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
    assert dense.shape == (layout.total, layout.total)
    for q in range(layout.total):
        for k in range(layout.total):
            assert bool(dense[q, k]) == sees(layout, cross, q, k), (q, k)


@pytest.mark.parametrize(("name", "mask"), [("enc_mask", "frame_causal_prefix"), ("dec_mask", "frame_causal")])
def test_published_masks(name, mask):
    want = load_file(DATA / "base" / "debug.safetensors")[name].bool()
    assert torch.equal(SequenceLayout([[(16, 16)] * 5], mask).visible(), want)


def test_metadata():
    layout = SequenceLayout([[(2, 1), (1, 2)], [], [(0, 3)]], "frame_causal")
    assert layout.cu_seqlens.tolist() == [0, 6, 6, 9]
    assert layout.frame.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert layout.rank.tolist() == [-1, -1, 0, -1, 0, 1, 0, 1, 2]
    assert (layout.total, layout.batch, layout.max_seqlen) == (9, 3, 6)
    assert SequenceLayout([], "full").total == 0


def check_plan(layout, plan, block_q, block_k):
    """Every seen pair lies in exactly one tile, no tile sees nothing, and the full flag is exact."""
    dense, covered = layout.visible().numpy(), np.zeros((layout.total,) * 2, dtype=int)
    rows = np.zeros(layout.total, dtype=int)
    for i, (sequence, q0, q1, _) in enumerate(plan.q_tiles):
        rows[q0:q1] += 1
        assert (layout.sequence[q0:q1] == sequence).all()
        assert q1 > q0 and (block_q == 0 or q1 - q0 <= block_q)
        for k0, k1, full in plan.k_tiles[plan.k_ptr[i] : plan.k_ptr[i + 1]]:
            assert k1 > k0 and (block_k == 0 or k1 - k0 <= block_k)
            assert dense[q0:q1, k0:k1].any()
            assert bool(full) == bool(dense[q0:q1, k0:k1].all())
            covered[q0:q1, k0:k1] += 1
    assert (rows == 1).all()
    assert covered.max(initial=0) <= 1
    assert not (dense & (covered == 0)).any()


@pytest.mark.parametrize("planner", ["native", "reference"])
@settings(max_examples=80, deadline=None)
@given(case=layouts(), block_q=st.sampled_from([0, 1, 3, 4]), block_k=st.sampled_from([0, 1, 2, 5]))
def test_plan(planner, case, block_q, block_k):
    layout, _ = case
    if planner == "native":
        if _native.C is None:
            pytest.skip(f"no C++ planner: {_native.cpu_unavailable}")
        plan = layout.plan(block_q, block_k)
    else:
        arrays = (layout.frame_offsets, layout.prefix_len, layout.suffix_len)
        made = plan_ref(*arrays, MASKS.index(layout.mask), np.array(layout.cross), block_q, block_k)
        plan = type(layout.plan(block_q, block_k))(*made)
    check_plan(layout, plan, block_q, block_k)


def test_planner_visits_few_tiles_beyond_the_needed():
    """The released encoder and decoder shapes, 128 x 128 tiles: visited area over seen area, in tiles."""
    for mask, limit in (("frame_causal_prefix", 1.15), ("frame_causal", 1.0)):
        layout = SequenceLayout([[(256, 256)] * 5], mask)
        plan = layout.plan(128, 128)
        spans = np.repeat(plan.q_tiles[:, 2] - plan.q_tiles[:, 1], np.diff(plan.k_ptr))
        visited = int((spans * (plan.k_tiles[:, 1] - plan.k_tiles[:, 0])).sum())
        assert visited <= limit * int(layout.visible().sum())


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


def test_wrong_tile_size():
    with pytest.raises(ValueError, match="must be >= 0"):
        SequenceLayout([[(1, 1)]], "full").plan(-1, 16)

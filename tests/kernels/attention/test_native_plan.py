"""The compiled planner of attention against dense masks, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkernels import _native

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")

FULL, CAUSAL, FRAME_CAUSAL, FRAME_CAUSAL_PREFIX = range(4)
NONE, ALL, RANK_CAUSAL = range(3)


def side(sequences):
    frames = [frame for sequence in sequences for frame in sequence]
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return offsets, *(np.array([frame[part] for frame in frames], dtype=np.int32) for part in (0, 1))


def plan(queries, keys, mask, cross, block_q, block_k, transposed=False):
    cross = np.array(cross, dtype=np.int32)
    return _native.C.plan(side(queries), side(keys), mask, cross, block_q, block_k, transposed)


def dense_mask(queries, keys, mask, cross):
    """Bool [queries, keys] of one sequence, straight from the definitions."""
    q_tokens, k_tokens = (
        [(f, rank) for f, (p, s) in enumerate(frames) for rank in [-1] * p + list(range(s))]
        for frames in (queries, keys)
    )

    def visible(i, j):
        (f_q, r_q), (f_k, r_k) = q_tokens[i], k_tokens[j]
        if mask == FULL:
            return True
        if mask == CAUSAL:
            return len(k_tokens) - j >= len(q_tokens) - i
        if mask == FRAME_CAUSAL or f_k > f_q:
            return f_k <= f_q
        if f_k == f_q:
            return r_k <= r_q
        rule = cross[2 * (r_q >= 0) + (r_k >= 0)]
        return rule == ALL or (rule == RANK_CAUSAL and r_k <= r_q)

    rows = [[visible(i, j) for j in range(len(k_tokens))] for i in range(len(q_tokens))]
    return np.array(rows, dtype=bool).reshape(len(q_tokens), len(k_tokens))


def tile_bounds(frames, block):
    n = sum(p + s for p, s in frames)
    if block:
        return [(i, min(i + block, n)) for i in range(0, n, block)]
    ends = np.cumsum([length for frame in frames for length in frame if length]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def brute_force_plan(queries, keys, mask, cross, block_q, block_k, transposed):
    tiles, ptr, runs, starts = [], [0], [], [0, 0]
    for b, frames in enumerate(zip(queries, keys, strict=True)):
        dense = dense_mask(*frames, mask, cross)
        bounds = [tile_bounds(frames[0], block_q), tile_bounds(frames[1], block_k)]
        at = list(starts)
        starts = [starts[0] + dense.shape[0], starts[1] + dense.shape[1]]
        if transposed:
            dense, bounds, at = dense.T, bounds[::-1], at[::-1]
        for r0, r1 in bounds[0]:
            found = {1: [], 0: []}
            for c0, c1 in bounds[1]:
                part = dense[r0:r1, c0:c1]
                if part.any():
                    same = found[int(part.all())]
                    if same and same[-1][1] == at[1] + c0:
                        same[-1][1] = at[1] + c1
                    else:
                        same.append([at[1] + c0, at[1] + c1])
            tiles.append([b, at[0] + r0, at[0] + r1, len(found[1])])
            runs += [[*run, full] for full in (1, 0) for run in found[full]]
            ptr.append(len(runs))
    return tiles, ptr, runs


frame_lengths = st.tuples(st.integers(0, 7), st.integers(0, 7))
sequence_frames = st.lists(frame_lengths, max_size=4)
rules = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), st.integers(0, 2))


@settings(max_examples=400, deadline=None)
@given(
    pairs=st.lists(st.tuples(sequence_frames, sequence_frames), max_size=3).flatmap(
        lambda found: st.lists(st.sampled_from(found or [([], [])]), max_size=5)
    ),
    self_attention=st.booleans(),
    mask=st.integers(0, 3),
    cross=st.sampled_from([(1, 1, 1, 1)]) | rules,
    block_q=st.sampled_from([0, 1, 3, 4, 8]),
    block_k=st.sampled_from([0, 1, 3, 4, 8]),
    transposed=st.booleans(),
)
def test_plan_equals_the_dense_mask(pairs, self_attention, mask, cross, block_q, block_k, transposed):
    queries = [q for q, _ in pairs]
    keys = queries if self_attention else [k for _, k in pairs]
    got = plan(queries, keys, mask, cross, block_q, block_k, transposed)
    want = brute_force_plan(queries, keys, mask, cross, block_q, block_k, transposed)
    for array, expected in zip(got, want, strict=True):
        assert array.dtype == np.int32 and array.tolist() == expected


def test_plan_shapes_without_tokens():
    for sequences in ([], [[]], [[(0, 0)], []]):
        shapes = [array.shape for array in plan(sequences, sequences, FULL, [1] * 4, 128, 128)]
        assert shapes == [(0, 4), (1,), (0, 3)]


def test_plan_copies_a_run_of_identical_sequences():
    frames = [[(256, 256)] * 5]
    for mask in range(4):
        tiles, _, runs = plan(frames * 64, frames * 64, mask, [1] * 4, 128, 128)
        _, one_ptr, one = plan(frames, frames, mask, [1] * 4, 128, 128)
        assert len(tiles) == 64 * 20 and len(runs) == 64 * one_ptr[-1]
        assert np.array_equal(runs[-len(one) :] - one, [[63 * 2560, 63 * 2560, 0]] * len(one))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask=4), ValueError, "mask must be 0 to 3, got 4"),
        (dict(block_q=-1), ValueError, "block_q and block_k must not be negative, got -1 and 8"),
        (dict(cross=np.array([1, 1, 1], np.int32)), ValueError, "cross must have 4 entries, got 3"),
        (dict(cross=np.array([2, 1, 1, 1], np.int32)), ValueError, "cross must hold 0 or 1"),
        (dict(prefix=np.array([1, -2], np.int32)), ValueError, "prefix_len must not be negative, got -2"),
        (dict(suffix=np.array([1], np.int32)), ValueError, "must be of equal length, got 2 and 1"),
        (dict(offsets=np.array([0, 3], np.int32)), ValueError, "frame_offsets must run from 0 to the number of frames"),
        (dict(offsets=np.array([0, 3, 2], np.int32)), ValueError, "frame_offsets must not fall"),
        (dict(prefix=np.array([2**31 - 1, 1], np.int32)), ValueError, "fewer than 2\\*\\*31 tokens"),
        (dict(prefix=np.array([1.5, 2.5])), TypeError, "incompatible function arguments"),
    ],
)
def test_plan_refuses(change, error, message):
    pair = np.array([1, 1], np.int32)
    lengths = dict(offsets=np.array([0, 2], np.int32), prefix=pair, suffix=pair)
    good = tuple(lengths.values())
    call = dict(mask=0, cross=np.ones(4, np.int32), block_q=8, block_k=8)
    bad = tuple((lengths | {k: v for k, v in change.items() if k in lengths}).values())
    call |= {k: v for k, v in change.items() if k in call}
    with pytest.raises(error, match=message):
        _native.C.plan(bad, bad if bad[1] is bad[2] else good, *call.values(), False)
    if "prefix" in change or "suffix" in change or "offsets" in change:
        with pytest.raises(error, match=message):
            _native.C.plan(good, bad, *call.values(), True)


def test_plan_refuses_another_number_of_key_sequences():
    with pytest.raises(ValueError, match="as many sequences as queries, got 2 and 1"):
        plan([[(1, 1)]], [[(1, 1)], []], FULL, [1] * 4, 8, 8)

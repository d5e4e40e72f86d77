"""The compiled planner of attention: runs of equal sequences, and what it refuses."""

import numpy as np
import pytest

from flexkernels import _native

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")

FULL = 0


def side(sequences):
    frames = [frame for sequence in sequences for frame in sequence]
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return offsets, *(np.array([frame[part] for frame in frames], dtype=np.int32) for part in (0, 1))


def plan(queries, keys, mask, cross, rows, step):
    return _native.plan(side(queries), side(keys), mask, np.array(cross, dtype=np.int32), rows, step)


def test_plan_shapes_without_tokens():
    for sequences in ([], [[]], [[(0, 0)], []]):
        shapes = [array.shape for array in plan(sequences, sequences, FULL, [1] * 4, 128, 64)]
        assert shapes == [(0,), (0, 128), *[(0, 8), (1,), (0, 3)] * 2]


@pytest.mark.parametrize("cross", [[1, 1, 1, 1], [1, 0, 0, 2]])
@pytest.mark.parametrize("mask", range(4))
def test_plan_copies_a_run_of_identical_sequences(mask, cross):
    if mask < 3 and cross != [1] * 4:
        pytest.skip("switches are of the last mask")
    frames, copies, tokens = [[(256, 33)] * 5], 64, 5 * 289
    many = plan(frames * copies, frames * copies, mask, cross, 64, 64)
    one = plan(frames, frames, mask, cross, 64, 64)
    for array, single in zip(many, one, strict=True):
        assert len(array) - len(single) == (copies - 1) * (len(single) - (single is one[3] or single is one[6]))
    reach, rows, tiles, _, runs, *_ = many
    shift = (copies - 1) * tokens
    assert np.array_equal(reach[-len(one[0]) or len(reach) :], one[0] + shift)
    assert np.array_equal(rows[-len(one[1]) :], one[1] + shift)
    assert np.array_equal(tiles[-len(one[2]) :, :4] - one[2][:, :4], [[copies - 1, shift, shift, 0]] * len(one[2]))
    assert np.array_equal(runs[-len(one[4]) :] - one[4], [[shift, shift, 0]] * len(one[4]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask=4), ValueError, "mask must be 0 to 3, got 4"),
        (dict(rows=0), ValueError, "rows and step must be at least 1, got 0 and 8"),
        (dict(cross=np.array([1, 1, 1], np.int32)), ValueError, "cross must have 4 entries, got 3"),
        (dict(cross=np.array([2, 1, 1, 1], np.int32)), ValueError, "cross must hold 0 or 1"),
        (dict(prefix=np.array([1, -2], np.int32)), ValueError, "prefix_len must not be negative, got -2"),
        (dict(suffix=np.array([1], np.int32)), ValueError, "must be of equal length, got 2 and 1"),
        (dict(offsets=np.array([0, 3], np.int32)), ValueError, "frame_offsets must run from 0 to the number of frames"),
        (dict(offsets=np.array([0, 3, 2], np.int32)), ValueError, "frame_offsets must not fall"),
        (dict(prefix=np.array([2**31 - 1, 1], np.int32)), ValueError, "fewer than 2\\*\\*31 tokens"),
        (dict(prefix=np.array([1.5, 2.5])), TypeError, "lengths and cross must be int32, got float64"),
    ],
)
def test_plan_refuses(change, error, message):
    pair = np.array([1, 1], np.int32)
    lengths = dict(offsets=np.array([0, 2], np.int32), prefix=pair, suffix=pair)
    good = tuple(lengths.values())
    call = dict(mask=0, cross=np.ones(4, np.int32), rows=8, step=8)
    bad = tuple((lengths | {k: v for k, v in change.items() if k in lengths}).values())
    call |= {k: v for k, v in change.items() if k in call}
    with pytest.raises(error, match=message):
        _native.plan(bad, bad if bad[1] is bad[2] else good, *call.values())
    if "prefix" in change or "suffix" in change or "offsets" in change:
        with pytest.raises(error, match=message):
            _native.plan(good, bad, *call.values())


def test_bytes_that_are_no_int32_are_refused():
    good = tuple(array.tobytes() for array in side([[(1, 1)]]))
    with pytest.raises(ValueError, match="arrays must hold int32 values, got 9 bytes"):
        _native.C.plan(good, (good[0] + b"0", *good[1:]), FULL, bytes(16), 8, 8)


def test_plan_refuses_another_number_of_key_sequences():
    with pytest.raises(ValueError, match="as many sequences as queries, got 2 and 1"):
        plan([[(1, 1)]], [[(1, 1)], []], FULL, [1] * 4, 8, 8)

"""SequenceLayout: a packed batch of framed sequences, and which token may see which.

Tokens of all sequences are concatenated (flash-attention's varlen convention, ``cu_seqlens``). A sequence is a run of
frames; a frame is its prefix tokens (patches) followed by its suffix tokens (registers). Visibility is a predicate of
frame index and rank inside the frame, so metadata is O(tokens): never an N x N mask, no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, wraps
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

from . import _native, tuning
from .upload import upload

MASKS = ("full", "causal", "frame_causal", "frame_causal_prefix")
CROSS_FRAME = ("prefix_to_prefix", "prefix_to_register", "register_to_prefix", "register_to_register")
CROSS_VALUES = ("none", "full", "causal")
ALL_FULL = (1, 1, 1, 1)


def cached_tensors(make: Callable) -> Callable:
    """A cache of the latest 64 results of `make`, objects that hold tensors, for equal arguments.

    What is cached is real, and made outside of inference mode: a program that is being exported takes it as a constant,
    and autograd can save it. Where all tensors are fake, nothing is cached.
    """

    @lru_cache(maxsize=64)
    def cached(*args):
        with torch.inference_mode(False):
            return make(*args)

    @wraps(make)
    def get(*args):
        mode = None if torch.compiler.is_dynamo_compiling() else detect_fake_mode()
        if mode is None:
            return cached(*args)
        if not mode.allow_non_fake_inputs:
            return make(*args)
        with _disable_current_modes():
            return cached(*args)

    return get


# keys of a tile, and what full runs hold whole numbers of unless they end with the sequence
STEP = 64
# weighted keys of a sequence are listed in whole steps of so many; what stands for no key is seen by no row
LISTED_STEP, NO_KEY = 16, 2**31 - 1


class TilePlan(NamedTuple):
    """What attention has to visit, int32; made by :func:`plan`.

    reach: ``[total]`` the end of the keys that a query row sees; empty with cross-frame switches, where keys are not
        seen up to an end.
    rows: ``[n, most rows of a tile]`` the query rows of each tile, ascending; the last one is repeated. Tiles hold
        blocks of one frame part each; what is left over of all parts of a sequence is gathered into tiles of its own.
    tiles: ``[n, 8]`` sequence, first, end (a tile's rows, counted tile by tile), number of full runs, and without
        switches the first key, where keys are no longer seen by every row, and where they are no longer seen at all.
    ptr: ``[n + 1]`` tile i owns rows ``ptr[i]:ptr[i + 1]`` of runs.
    runs: ``[m, 3]`` first key, end key, 1 if every row of the tile sees every key of the run; the full runs of a tile
        come first, each kind in ascending order.
    key_tiles, key_ptr, key_runs: the same for tiles of keys, whose runs are of query rows; without switches the last
        columns are the first row that sees a key, the first of those that see all, and the last row's end.
    """

    reach: np.ndarray
    rows: np.ndarray
    tiles: np.ndarray
    ptr: np.ndarray
    runs: np.ndarray
    key_tiles: np.ndarray
    key_ptr: np.ndarray
    key_runs: np.ndarray


class LayoutTensors(NamedTuple):
    """What attention kernels read of a layout: int32 tensors on its device.

    cu_seqlens, frame, rank of the queries and of the keys, the :class:`TilePlan`, and weighted ``[batch, n]``: the
    keys of each sequence that may have a weight, then NO_KEY; n is 0 where any may.
    """

    cu_seqlens: torch.Tensor
    frame: torch.Tensor
    rank: torch.Tensor
    cu_seqlens_k: torch.Tensor
    frame_k: torch.Tensor
    rank_k: torch.Tensor
    reach: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor
    ptr: torch.Tensor
    runs: torch.Tensor
    key_tiles: torch.Tensor
    key_ptr: torch.Tensor
    key_runs: torch.Tensor
    weighted: torch.Tensor


class Side:
    """The tokens of one side, queries or keys: lengths of frame parts, and what follows from them."""

    def __init__(self, frames: Sequence[Sequence[tuple[int, int]]], name: str) -> None:
        self.frame_offsets = np.cumsum([0] + [len(s) for s in frames], dtype=np.int32)
        pairs = np.array([pair for s in frames for pair in s], dtype=np.int32).reshape(-1, 2)
        if (pairs < 0).any():
            raise ValueError(f"{name} must hold non-negative lengths, got {pairs[(pairs < 0).any(1)][0].tolist()}")
        self.prefix_len, self.suffix_len = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
        lengths = pairs.sum(1)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if ends[-1] >= 2**31:
            raise ValueError(f"{name} must hold fewer than 2**31 tokens in all, got {ends[-1]}")
        frame = np.arange(len(pairs)) - np.repeat(self.frame_offsets[:-1], np.diff(self.frame_offsets))
        position = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        rank = np.maximum(position - np.repeat(self.prefix_len, lengths), -1)
        self.cu_seqlens = ends[self.frame_offsets].astype(np.int32)
        self.frame, self.rank = np.repeat(frame, lengths).astype(np.int32), rank.astype(np.int32)
        self.total, self.max_seqlen = int(ends[-1]), int(np.diff(self.cu_seqlens).max(initial=0))

    @property
    def tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.cu_seqlens, self.frame, self.rank

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the planner takes: frame_offsets, prefix_len, suffix_len."""
        return self.frame_offsets, self.prefix_len, self.suffix_len


class SequenceLayout:
    """Which token of a packed batch may see which.

    Args:
        frames: one list per sequence with one ``(prefix_len, suffix_len)`` pair per frame. Frames of a sequence may
            differ; empty frames and empty sequences are allowed.
        mask: ``"full"``: everything in the sequence. ``"causal"``: keys at or before the query's position (with
            key_frames, positions are counted from the ends: key position <= query position + key length - query
            length). ``"frame_causal"``: earlier frames and the whole own frame. ``"frame_causal_prefix"``: earlier
            frames; in the own frame a prefix token sees the prefix, and register r sees the prefix and registers 0..r.
        cross_frame: only for ``"frame_causal_prefix"``: how earlier frames are seen, a mapping from
            ``"prefix_to_prefix"``, ``"prefix_to_register"``, ``"register_to_prefix"``, ``"register_to_register"``
            (query to key) to ``"full"`` (default), ``"none"``, or, for register to register, ``"causal"`` (key
            register index <= query register index).
        device: where the index tensors live.
        key_frames: like frames, for keys that are other tokens than the queries (cross-attention); as many sequences.
        weighted_keys: rising indices of the keys that may have a weight, where those are few: attention may then take
            ``key_log_weight`` for 0 at all others, and for 0 or more at these. Default: any key, any weight.

    Attributes:
        cu_seqlens: int32 ``[batch + 1]``; frame: int32 ``[total]`` frame index inside the sequence;
        rank: int32 ``[total]``, -1 for prefix tokens and the register index for suffix tokens;
        total, total_k, batch, max_seqlen: Python ints; device: with its index; tensors: :class:`LayoutTensors` for the
        kernels; arguments: what the ops take of a layout.

    Making one takes some hundred microseconds, all on the host; keep it, or use :meth:`cached`.

    Raises:
        ValueError: unknown mask or switch, a negative length, another number of key sequences, or weighted_keys that
            do not rise within the keys.
    """

    def __init__(
        self,
        frames: Sequence[Sequence[tuple[int, int]]],
        mask: str = "frame_causal",
        cross_frame: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        key_frames: Sequence[Sequence[tuple[int, int]]] | None = None,
        weighted_keys: Sequence[int] | None = None,
    ) -> None:
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        if key_frames is not None and len(key_frames) != len(frames):
            raise ValueError(f"key_frames must have {len(frames)} sequences like frames, got {len(key_frames)}")
        self._build(frames, mask, _cross_codes(mask, cross_frame), device, key_frames, weighted_keys)

    def _build(self, frames, mask, cross, device, key_frames, weighted_keys) -> None:
        self.mask, self.cross, self.device = mask, cross, _with_index(device)
        self.queries = Side(frames, "frames")
        self.keys = self.queries if key_frames is None else Side(key_frames, "key_frames")
        self.total, self.total_k = self.queries.total, self.keys.total
        self.batch, self.max_seqlen = len(frames), self.queries.max_seqlen

        made = plan(self.queries, self.keys, MASKS.index(mask), cross, tile_rows(self.device, mask, self.keys))
        same, arrays = self.keys is self.queries, (*made, listed(weighted_keys, self.keys))
        arrays = *self.queries.tokens, *(() if same else self.keys.tokens), *arrays
        tensors = upload([torch.tensor(x) for x in arrays], self.device, kept=True)
        own = tensors[:3]
        self.tensors = LayoutTensors(*own, *(own if same else ()), *tensors[3:])
        self.cu_seqlens, self.frame, self.rank = own
        self.arguments = list(self.tensors), MASKS.index(mask), list(cross)

    @classmethod
    def cached(
        cls, frames: Sequence[Sequence[tuple[int, int]]], mask: str = "frame_causal",
        cross_frame: Mapping[str, str] | None = None, device: torch.device | str = "cpu",
        key_frames: Sequence[Sequence[tuple[int, int]]] | None = None, weighted_keys: Sequence[int] | None = None,
    ) -> SequenceLayout:  # fmt: skip
        """The same layout object for equal arguments; the latest 64 are kept."""
        freeze = lambda batch: None if batch is None else tuple(tuple(map(tuple, s)) for s in batch)  # noqa: E731
        cross = tuple(sorted(cross_frame.items())) if cross_frame else None
        weighted = None if weighted_keys is None else tuple(weighted_keys)
        return _cached_layout(freeze(frames), mask, cross, _with_index(device), freeze(key_frames), weighted)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        mask: str = "full",
        device: torch.device | str = "cpu",
        key_lengths: Sequence[int] | None = None,
    ) -> SequenceLayout:
        """Plain variable-length sequences without frames; ``mask`` is ``"full"`` or ``"causal"``."""
        if mask not in ("full", "causal"):
            raise ValueError(f"mask must be full or causal for sequences without frames, got {mask!r}")
        frames = lambda sizes: [[(int(n), 0)] for n in sizes]  # noqa: E731
        keys = None if key_lengths is None else frames(key_lengths)
        return cls(frames(lengths), mask, device=device, key_frames=keys)

    def __repr__(self) -> str:
        keys = "" if self.keys is self.queries else f" on {self.total_k} keys"
        return (
            f"SequenceLayout({self.batch} sequences, {self.total} tokens{keys}, mask={self.mask!r}, "
            f"device={self.device})"
        )

    @cached_property
    def sequence(self) -> torch.Tensor:
        """int64 ``[total]``: the sequence each token belongs to."""
        return _sequence(self.cu_seqlens, self.total)

    def visible(self) -> torch.Tensor:
        """Dense bool ``[total, total_k]``, entry (q, k) true where q may see k. For tests and small layouts only."""
        return visible_tokens(self.tensors, self.mask, self.cross)


@cached_tensors
def _cached_layout(frames, mask, cross_frame, device, key_frames, weighted_keys) -> SequenceLayout:
    return SequenceLayout(frames, mask, dict(cross_frame or ()), device, key_frames, weighted_keys)


def _with_index(device: torch.device | str) -> torch.device:
    """The device that tensors made on `device` say they are on: "cuda" is the current one, "cuda:0" say."""
    return torch.empty(0, device=device).device


def plan(queries: Side, keys: Side, mask: int, cross, rows: int, step: int = STEP) -> TilePlan:
    """The planner on two sides, in C++ where it was built; ``rows``: of a tile of queries, at most."""
    make = _native.plan if _native.C else plan_ref
    return TilePlan(*make(queries.lengths, keys.lengths, mask, np.array(cross, dtype=np.int32), rows, step))


def tile_rows(device: torch.device, mask: str, keys: Side) -> int:
    """Query rows of a tile, as the kernels of a device want them."""
    return 64 if device.type != "cuda" else tuning.choose("attention_layout", mask=mask, keys=keys.max_seqlen)["rows"]


def listed(weighted_keys: Sequence[int] | None, keys: Side) -> np.ndarray:
    """``weighted`` of :class:`LayoutTensors`."""
    batch, chosen = len(keys.cu_seqlens) - 1, np.array([] if weighted_keys is None else weighted_keys, dtype=np.int64)
    if (np.diff(chosen) <= 0).any() or (len(chosen) and not 0 <= chosen[0] <= chosen[-1] < keys.total):
        raise ValueError(f"weighted_keys must rise within the {keys.total} keys, got {chosen.tolist()[:8]}")
    first = np.searchsorted(chosen, keys.cu_seqlens)
    width = 0 if weighted_keys is None else max(1, np.diff(first).max(initial=0))
    table = np.full((batch, -(-width // LISTED_STEP) * LISTED_STEP), NO_KEY, dtype=np.int32)
    for sequence, (begin, end) in enumerate(pairwise(first.tolist())):
        table[sequence, : end - begin] = chosen[begin:end]
    return table


def switched(mask: int, cross) -> bool:
    """Whether a cross-frame switch says otherwise than that a query sees the keys up to some end."""
    return MASKS[mask] == "frame_causal_prefix" and any(code != 1 for code in cross)


def visible_tokens(t: LayoutTensors, mask: str, cross) -> torch.Tensor:
    """Bool ``[total, total_k]``: which token sees which."""
    q_sequence, k_sequence = _sequence(t.cu_seqlens, len(t.frame)), _sequence(t.cu_seqlens_k, len(t.frame_k))
    # positions counted from the end of the sequence, on both sides
    q_index = torch.arange(len(t.frame), device=t.frame.device) - t.cu_seqlens[1:][q_sequence]
    k_index = torch.arange(len(t.frame_k), device=t.frame.device) - t.cu_seqlens_k[1:][k_sequence]
    inside = visible(mask, tuple(cross), q_index, t.frame, t.rank, k_index, t.frame_k, t.rank_k)
    return inside & (q_sequence[:, None] == k_sequence[None, :])


def _sequence(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The sequence of each of `total` tokens; by a search, since a trace knows no lengths."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(total, device=cu_seqlens.device), right=True)


def visible(mask, cross, q_index, q_frame, q_rank, k_index, k_frame, k_rank) -> torch.Tensor:
    """Bool ``[queries, keys]``: the mask predicate for tokens of one sequence, from index, frame and rank."""
    q_index, q_frame, q_rank = q_index[:, None], q_frame[:, None], q_rank[:, None]
    if mask == "full":
        return torch.ones(len(q_index), k_index.shape[-1], dtype=torch.bool, device=q_index.device)
    if mask == "causal":
        return k_index <= q_index
    if mask == "frame_causal":
        return k_frame <= q_frame
    own = (k_frame == q_frame) & (k_rank <= q_rank)
    earlier = k_frame < q_frame
    if cross == ALL_FULL:
        return earlier | own
    q_suffix, k_suffix = q_rank >= 0, k_rank >= 0
    part = 2 * q_suffix.int() + k_suffix.int()
    switch = torch.tensor(cross, device=q_index.device)[part]
    return own | (earlier & ((switch == 1) | ((switch == 2) & (k_rank <= q_rank))))


def _cross_codes(mask: str, cross_frame: Mapping[str, str] | None) -> tuple[int, int, int, int]:
    cross_frame = dict(cross_frame or {})
    if cross_frame and mask != "frame_causal_prefix":
        raise ValueError(f"cross_frame needs mask 'frame_causal_prefix', got mask {mask!r}")
    codes = []
    for name in CROSS_FRAME:
        value = cross_frame.pop(name, "full")
        allowed = CROSS_VALUES if name == "register_to_register" else CROSS_VALUES[:2]
        if value not in allowed:
            raise ValueError(f"cross_frame[{name!r}] must be one of {', '.join(allowed)}, got {value!r}")
        codes.append(CROSS_VALUES.index(value))
    if cross_frame:
        raise ValueError(f"cross_frame keys must be among {', '.join(CROSS_FRAME)}, got {sorted(cross_frame)}")
    return tuple(codes)


def plan_ref(queries, keys, mask, cross, rows, step):
    """The planner in NumPy, by evaluating the mask pair by pair: the specification of the C++ one, and its stand-in."""
    by_pairs = switched(mask, cross)
    reach, listed, of_queries, of_keys = [], [], _Tiles(), _Tiles()
    row0 = key0 = 0
    for sequence, pair in enumerate(zip(_sequences(queries), _sequences(keys), strict=True)):
        q, k = (Side([frames], "frames") for frames in pair)
        seen = _seen(q, k, mask, cross)
        ends = seen.sum(1)
        first = row0
        for tile in _gather(_groups(q, MASKS[mask]), rows):
            if by_pairs:
                found, glance = _runs(seen[tile], step), None
            else:
                least, most = ends[tile].min(), ends[tile].max()
                middle = most if least == most else least // step * step
                found, glance = [(0, middle, 1), (middle, most, 0)], (0, middle, most)
            of_queries.add(sequence, first, first + len(tile), found, glance, key0)
            listed.append(row0 + np.pad(tile, (0, rows - len(tile)), "edge"))
            first += len(tile)
        for at in range(0, k.total, step):
            part = seen[:, at : at + step]
            if by_pairs:
                found, glance = _runs(part.T, step), None
            else:
                # the rows that see some key, and that see all, are the last ones
                some, every = (q.total - int(n.sum()) for n in (part.any(1), part.all(1)))
                middle = every if some == every else q.total - (q.total - every) // step * step
                found, glance = [(middle, q.total, 1), (some, middle, 0)], (some, middle, q.total)
            of_keys.add(sequence, key0 + at, key0 + at + part.shape[1], found, glance, row0)
        reach += [] if by_pairs else (key0 + ends).tolist()
        row0, key0 = row0 + q.total, key0 + k.total
    return _ints(reach), _ints(listed, rows), *of_queries.arrays(), *of_keys.arrays()


class _Tiles:
    def __init__(self):
        self.tiles, self.ptr, self.runs = [], [0], []

    def add(self, sequence, first, end, found, glance, start):
        found = [(start + begin, start + stop, full) for begin, stop, full in found if begin < stop]
        glance = [start + at for at in glance] if glance else [0, 0, 0]
        self.tiles.append((sequence, first, end, sum(full for *_, full in found), *glance, 0))
        self.runs += found
        self.ptr.append(len(self.runs))

    def arrays(self):
        return _ints(self.tiles, 8), _ints(self.ptr), _ints(self.runs, 3)


def _ints(values, width=None) -> np.ndarray:
    return np.array(values, dtype=np.int32).reshape(-1 if width is None else (-1, width))


def _groups(side: Side, mask: str) -> list[np.ndarray]:
    """Rows that see the same keys, or nearly: the sequence, its frames, or the parts of these."""
    if mask in ("full", "causal"):
        group = np.zeros(side.total)
    else:
        group = side.frame if mask == "frame_causal" else 2 * side.frame + (side.rank >= 0)
    return [np.flatnonzero(group == value) for value in np.unique(group)]


def _gather(groups: list[np.ndarray], rows: int) -> list[np.ndarray]:
    """Whole blocks of each group, then blocks of what is left over; in the order of their last rows."""
    whole = [group[at : at + rows] for group in groups for at in range(0, len(group) - rows + 1, rows)]
    rest = np.concatenate([np.zeros(0, dtype=int), *(group[len(group) // rows * rows :] for group in groups)])
    return sorted(whole + [rest[at : at + rows] for at in range(0, len(rest), rows)], key=lambda tile: tile[-1])


def _runs(seen: np.ndarray, step: int) -> list[tuple[int, int, int]]:
    """Runs [begin, end, full] of the columns that rows see, full ones first, neighbouring tiles of a kind in one."""
    found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for at in range(0, seen.shape[1], step):
        part = seen[:, at : at + step]
        if part.any():
            same = found[bool(part.all())]
            begin = same.pop()[0] if same and same[-1][1] == at else at
            same.append((begin, at + part.shape[1]))
    return [(*run, int(full)) for full in (True, False) for run in found[full]]


def _sequences(lengths) -> list[list[tuple[int, int]]]:
    frame_offsets, prefix_len, suffix_len = lengths
    pairs = list(zip(prefix_len.tolist(), suffix_len.tolist(), strict=True))
    return [pairs[a:b] for a, b in pairwise(frame_offsets.tolist())]


def _seen(queries: Side, keys: Side, mask: int, cross) -> np.ndarray:
    as_tensors = lambda side: [  # noqa: E731
        torch.arange(side.total) - side.total,
        torch.from_numpy(side.frame),
        torch.from_numpy(side.rank),
    ]
    return visible(MASKS[mask], tuple(int(c) for c in cross), *as_tensors(queries), *as_tensors(keys)).numpy()

"""SequenceLayout: a packed batch of framed sequences, and which token may see which.

Tokens of all sequences are concatenated (flash-attention's varlen convention, ``cu_seqlens``). A sequence is a run of
frames; a frame is its prefix tokens (patches) followed by its suffix tokens (registers). Visibility is a predicate of
frame index and rank inside the frame, so metadata is O(tokens): never an N x N mask, no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from . import _native

MASKS = ("full", "causal", "frame_causal", "frame_causal_prefix")
CROSS_FRAME = ("prefix_to_prefix", "prefix_to_register", "register_to_prefix", "register_to_register")
CROSS_VALUES = ("none", "full", "causal")
ALL_FULL = (1, 1, 1, 1)


class PlanTiles(NamedTuple):
    """Sizes of the plans that a layout carries: rows of a tile, and what its runs are multiples of."""

    rows: int
    step: int


def plan_tiles(device: torch.device) -> PlanTiles:
    """Those that the kernels of a device want."""
    return PlanTiles(128, 64) if device.type == "cuda" else PlanTiles(64, 64)


class TilePlan(NamedTuple):
    """Tiles of one attention call, int32, made by :meth:`SequenceLayout.plan`.

    tiles: ``[n, 4]`` sequence, first row, end row (rows are indices into the packed queries), number of full runs.
    ptr: ``[n + 1]`` tile i owns rows ``ptr[i]:ptr[i + 1]`` of runs.
    runs: ``[m, 3]`` first key, end key, 1 if every row of the tile sees every key of the run; the full runs of a tile
        come first, each kind in ascending order.

    Of a transposed plan the tiles are of keys and the runs of queries.
    """

    tiles: np.ndarray
    ptr: np.ndarray
    runs: np.ndarray


class LayoutTensors(NamedTuple):
    """What attention kernels read of a layout: int32 tensors on its device.

    cu_seqlens, frame, rank of the queries and of the keys; the plan and the transposed one, in the sizes of
    :func:`plan_tiles`.
    """

    cu_seqlens: torch.Tensor
    frame: torch.Tensor
    rank: torch.Tensor
    cu_seqlens_k: torch.Tensor
    frame_k: torch.Tensor
    rank_k: torch.Tensor
    tiles: torch.Tensor
    ptr: torch.Tensor
    runs: torch.Tensor
    key_tiles: torch.Tensor
    key_ptr: torch.Tensor
    key_runs: torch.Tensor


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
    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the planner takes: frame_offsets, prefix_len, suffix_len."""
        return self.frame_offsets, self.prefix_len, self.suffix_len

    def sequence(self) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.arange(len(self.cu_seqlens) - 1), np.diff(self.cu_seqlens)))


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

    Attributes:
        cu_seqlens: int32 ``[batch + 1]``; frame: int32 ``[total]`` frame index inside the sequence;
        rank: int32 ``[total]``, -1 for prefix tokens and the register index for suffix tokens;
        total, total_k, batch, max_seqlen: Python ints; tensors: :class:`LayoutTensors` for the kernels.

    Making one takes some hundred microseconds, all on the host; keep it, or use :meth:`cached`.

    Raises:
        ValueError: unknown mask or switch, a negative length, or another number of key sequences.
    """

    def __init__(
        self,
        frames: Sequence[Sequence[tuple[int, int]]],
        mask: str = "frame_causal",
        cross_frame: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        key_frames: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        if key_frames is not None and len(key_frames) != len(frames):
            raise ValueError(f"key_frames must have {len(frames)} sequences like frames, got {len(key_frames)}")
        self._build(frames, mask, _cross_codes(mask, cross_frame), device, key_frames)

    def _build(self, frames, mask, cross, device, key_frames) -> None:
        self.mask, self.cross, self.device = mask, cross, torch.device(device)
        self.queries = Side(frames, "frames")
        self.keys = self.queries if key_frames is None else Side(key_frames, "key_frames")
        self.total, self.total_k = self.queries.total, self.keys.total
        self.batch, self.max_seqlen = len(frames), self.queries.max_seqlen
        self._plans: dict[tuple[int, int, bool], TilePlan] = {}

        own = [torch.from_numpy(x) for x in (self.queries.cu_seqlens, self.queries.frame, self.queries.rank)]
        other = own
        if self.keys is not self.queries:
            other = [torch.from_numpy(x) for x in (self.keys.cu_seqlens, self.keys.frame, self.keys.rank)]
        rows, step = plan_tiles(self.device)
        plans = (*self.plan(rows, step), *self.plan(step, rows, transposed=True))
        moved = [x.to(self.device) for x in own]
        keys = moved if other is own else [x.to(self.device) for x in other]
        self.tensors = LayoutTensors(*moved, *keys, *(torch.from_numpy(x).to(self.device) for x in plans))
        self.cu_seqlens, self.frame, self.rank = moved

    @classmethod
    def cached(cls, frames, mask="frame_causal", cross_frame=None, device="cpu", key_frames=None) -> SequenceLayout:
        """The same layout object for equal arguments; the latest 64 are kept."""
        freeze = lambda batch: None if batch is None else tuple(tuple(map(tuple, s)) for s in batch)  # noqa: E731
        cross = tuple(sorted(cross_frame.items())) if cross_frame else None
        return _cached_layout(freeze(frames), mask, cross, torch.device(device), freeze(key_frames))

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
        frames = lambda sizes: None if sizes is None else [[(int(n), 0)] for n in sizes]  # noqa: E731
        return cls(frames(lengths), mask, device=device, key_frames=frames(key_lengths))

    @classmethod
    def from_codes(
        cls, frames, mask: int, cross: Sequence[int], device: torch.device | str = "cpu", key_frames=None
    ) -> SequenceLayout:
        """The layout of the ops' own numbers: ``mask`` indexes MASKS, ``cross`` CROSS_VALUES, as CROSS_FRAME."""
        layout = cls.__new__(cls)
        layout._build(frames, MASKS[mask], tuple(int(code) for code in cross), device, key_frames)
        return layout

    def __repr__(self) -> str:
        keys = "" if self.keys is self.queries else f" on {self.total_k} keys"
        return (
            f"SequenceLayout({self.batch} sequences, {self.total} tokens{keys}, mask={self.mask!r}, "
            f"device={self.device})"
        )

    @cached_property
    def sequence(self) -> torch.Tensor:
        """int64 ``[total]``: the sequence each token belongs to."""
        return self.queries.sequence().to(self.device)

    def visible(self) -> torch.Tensor:
        """Dense bool ``[total, total_k]``, entry (q, k) true where q may see k. For tests and small layouts only."""
        q_sequence, k_sequence = self.sequence, self.keys.sequence().to(self.device)
        t = self.tensors
        # positions counted from the end of the sequence, on both sides
        q_index = torch.arange(self.total, device=self.device) - t.cu_seqlens[1:][q_sequence]
        k_index = torch.arange(self.total_k, device=self.device) - t.cu_seqlens_k[1:][k_sequence]
        inside = visible(self.mask, self.cross, q_index, t.frame, t.rank, k_index, t.frame_k, t.rank_k)
        return inside & (q_sequence[:, None] == k_sequence[None, :])

    def plan(self, block_q: int = 128, block_k: int = 128, transposed: bool = False) -> TilePlan:
        """The tiles an attention kernel has to visit, as NumPy arrays, cached per tile size.

        Tiles start at the sequence start and never cross a sequence. ``block_q=0`` or ``block_k=0`` gives one tile per
        frame part (prefix or suffix). Tiles in which no row sees any key are left out; neighbouring tiles of one kind
        are one run. ``transposed`` lists, for each tile of keys, the queries that see them.
        """
        if block_q < 0 or block_k < 0:
            raise ValueError(f"block_q and block_k must be >= 0, got {block_q} and {block_k}")
        key = (block_q, block_k, transposed)
        if key not in self._plans:
            mask = MASKS.index(self.mask)
            self._plans[key] = plan(self.queries, self.keys, mask, self.cross, block_q, block_k, transposed)
        return self._plans[key]


@lru_cache(maxsize=64)
def _cached_layout(frames, mask, cross_frame, device, key_frames) -> SequenceLayout:
    return SequenceLayout(frames, mask, dict(cross_frame or ()), device, key_frames)


def plan(queries: Side, keys: Side, mask: int, cross, block_q: int, block_k: int, transposed: bool = False) -> TilePlan:
    """The planner on two sides, in C++ where it was built."""
    make = _native.C.plan if _native.C else plan_ref
    cross = np.array(cross, dtype=np.int32)
    return TilePlan(*make(queries.lengths, keys.lengths, mask, cross, block_q, block_k, transposed))


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


def plan_ref(queries, keys, mask, cross, block_q, block_k, transposed):
    """The planner in NumPy, by evaluating the mask tile by tile: the specification of the C++ one, and its stand-in."""
    tiles, ptr, runs = [], [0], []
    starts = [0, 0]
    for sequence, pair in enumerate(zip(_sequences(queries), _sequences(keys), strict=True)):
        sides = [Side([frames], "frames") for frames in pair]
        bounds = [_tile_bounds(side, block) for side, block in zip(sides, (block_q, block_k), strict=True)]
        seen = _seen(*sides, mask, cross)
        if transposed:
            seen, bounds = seen.T, bounds[::-1]
        row_start, start = starts[::-1] if transposed else starts
        for q0, q1 in bounds[0]:
            found = {True: [], False: []}
            for k0, k1 in bounds[1]:
                if seen[q0:q1, k0:k1].any():
                    same = found[bool(seen[q0:q1, k0:k1].all())]
                    if same and same[-1][1] == start + k0:
                        same[-1][1] = start + k1
                    else:
                        same.append([start + k0, start + k1])
            tiles.append((sequence, row_start + q0, row_start + q1, len(found[True])))
            runs += [(*run, int(full)) for full in (True, False) for run in found[full]]
            ptr.append(len(runs))
        starts = [at + side.total for at, side in zip(starts, sides, strict=True)]
    as_int = lambda rows, width: np.array(rows, dtype=np.int32).reshape(-1, width)  # noqa: E731
    return as_int(tiles, 4), np.array(ptr, dtype=np.int32), as_int(runs, 3)


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


def _tile_bounds(side: Side, block: int) -> list[tuple[int, int]]:
    parts = [n for pair in zip(side.prefix_len.tolist(), side.suffix_len.tolist(), strict=True) for n in pair if n]
    bounds = [0, *np.cumsum(parts).tolist()] if block == 0 else [*range(0, side.total, block), side.total]
    return list(pairwise(bounds)) if side.total else []

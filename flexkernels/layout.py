"""SequenceLayout: a packed batch of framed sequences, and which token may see which.

Tokens of all sequences are concatenated (flash-attention's varlen convention, ``cu_seqlens``). A sequence is a run of
frames; a frame is its prefix tokens (patches) followed by its suffix tokens (registers). Visibility is a predicate of
frame index and rank inside the frame, so metadata is O(tokens): never an N x N mask, no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from . import _native

MASKS = ("full", "causal", "frame_causal", "frame_causal_prefix")
CROSS_FRAME = ("prefix_to_prefix", "prefix_to_register", "register_to_prefix", "register_to_register")
CROSS_VALUES = ("none", "full", "causal")
ALL_FULL = (1, 1, 1, 1)


class TilePlan(NamedTuple):
    """Tiles of one attention call, int32 NumPy arrays, made by :meth:`SequenceLayout.plan`.

    q_tiles: ``[n, 4]`` sequence, first row, end row, 0 (rows are indices into the packed batch).
    k_ptr: ``[n + 1]`` query tile i owns rows ``k_ptr[i]:k_ptr[i + 1]`` of k_tiles.
    k_tiles: ``[m, 3]`` first key, end key, 1 if every row of the query tile sees every key of it.
    """

    q_tiles: np.ndarray
    k_ptr: np.ndarray
    k_tiles: np.ndarray


class SequenceLayout:
    """Which token of a packed batch may see which.

    Args:
        frames: one list per sequence with one ``(prefix_len, suffix_len)`` pair per frame. Frames of a sequence may
            differ; empty frames and empty sequences are allowed.
        mask: ``"full"``: everything in the sequence. ``"causal"``: keys at or before the query's position.
            ``"frame_causal"``: earlier frames and the whole own frame. ``"frame_causal_prefix"``: earlier frames; in
            the own frame a prefix token sees the prefix, and register r sees the prefix and registers 0..r.
        cross_frame: only for ``"frame_causal_prefix"``: how earlier frames are seen, a mapping from
            ``"prefix_to_prefix"``, ``"prefix_to_register"``, ``"register_to_prefix"``, ``"register_to_register"``
            (query to key) to ``"full"`` (default), ``"none"``, or, for register to register, ``"causal"`` (key
            register index <= query register index).
        device: where the index tensors live.

    Attributes:
        cu_seqlens: int32 ``[batch + 1]``; frame: int32 ``[total]`` frame index inside the sequence;
        rank: int32 ``[total]``, -1 for prefix tokens and the register index for suffix tokens;
        total, batch, max_seqlen: Python ints.

    Raises:
        ValueError: unknown mask or switch, or a negative length.
    """

    def __init__(
        self,
        frames: Sequence[Sequence[tuple[int, int]]],
        mask: str = "frame_causal",
        cross_frame: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        self.mask = mask
        self.cross = _cross_codes(mask, cross_frame)
        self.frame_offsets = np.cumsum([0] + [len(s) for s in frames], dtype=np.int32)
        pairs = np.array([pair for s in frames for pair in s], dtype=np.int32).reshape(-1, 2)
        if (pairs < 0).any():
            raise ValueError(f"frames must hold non-negative lengths, got {pairs[(pairs < 0).any(1)][0].tolist()}")
        self.prefix_len, self.suffix_len = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
        self.device = torch.device(device)

        lengths = pairs.sum(1)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if ends[-1] >= 2**31:
            raise ValueError(f"frames must hold fewer than 2**31 tokens in all, got {ends[-1]}")
        cu_seqlens = ends[self.frame_offsets].astype(np.int32)
        frame_in_sequence = np.arange(len(pairs)) - np.repeat(self.frame_offsets[:-1], np.diff(self.frame_offsets))
        position = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        rank = np.maximum(position - np.repeat(self.prefix_len, lengths), -1)

        self.total, self.batch = int(ends[-1]), len(frames)
        self.max_seqlen = int(np.diff(cu_seqlens).max(initial=0))
        self.cu_seqlens = torch.from_numpy(cu_seqlens).to(self.device)
        self.frame = torch.from_numpy(np.repeat(frame_in_sequence, lengths).astype(np.int32)).to(self.device)
        self.rank = torch.from_numpy(rank.astype(np.int32)).to(self.device)
        self._plans: dict[tuple[int, int], TilePlan] = {}

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], mask: str = "full", device: torch.device | str = "cpu"
    ) -> SequenceLayout:
        """Plain variable-length sequences without frames; ``mask`` is ``"full"`` or ``"causal"``."""
        if mask not in ("full", "causal"):
            raise ValueError(f"mask must be full or causal for sequences without frames, got {mask!r}")
        return cls([[(int(n), 0)] for n in lengths], mask, device=device)

    @classmethod
    def from_codes(cls, frames, mask: int, cross: Sequence[int], device: torch.device | str = "cpu") -> SequenceLayout:
        """The layout of the ops' own numbers: ``mask`` indexes MASKS, ``cross`` CROSS_VALUES, as CROSS_FRAME."""
        layout = cls(frames, MASKS[mask], device=device)
        layout.cross = tuple(int(code) for code in cross)
        return layout

    def __repr__(self) -> str:
        return f"SequenceLayout({self.batch} sequences, {self.total} tokens, mask={self.mask!r}, device={self.device})"

    @cached_property
    def sequence(self) -> torch.Tensor:
        """int32 ``[total]``: the sequence each token belongs to."""
        lengths = self.cu_seqlens.diff()
        return torch.arange(self.batch, dtype=torch.int32, device=self.device).repeat_interleave(lengths)

    def visible(self) -> torch.Tensor:
        """Dense bool ``[total, total]``, entry (q, k) true where q may see k. For tests and small layouts only."""
        index = torch.arange(self.total, device=self.device)
        inside = visible(self.mask, self.cross, index, self.frame, self.rank, index, self.frame, self.rank)
        return inside & (self.sequence[:, None] == self.sequence[None, :])

    def plan(self, block_q: int = 128, block_k: int = 128) -> TilePlan:
        """The tiles an attention kernel has to visit, cached per tile size.

        Tiles start at the sequence start and never cross a sequence. ``block_q=0`` or ``block_k=0`` gives one tile per
        frame part (prefix or suffix). Tiles in which no row sees any key are left out.
        """
        if block_q < 0 or block_k < 0:
            raise ValueError(f"block_q and block_k must be >= 0, got {block_q} and {block_k}")
        key = (block_q, block_k)
        if key not in self._plans:
            make = _native.C.plan if _native.C else plan_ref
            mask = MASKS.index(self.mask)
            cross = np.array(self.cross, dtype=np.int32)
            arrays = make(self.frame_offsets, self.prefix_len, self.suffix_len, mask, cross, block_q, block_k)
            self._plans[key] = TilePlan(*arrays)
        return self._plans[key]


def visible(mask, cross, q_index, q_frame, q_rank, k_index, k_frame, k_rank) -> torch.Tensor:
    """Bool ``[queries, keys]``: the mask predicate for tokens of one sequence, from index, frame and rank."""
    q_index, q_frame, q_rank = q_index[:, None], q_frame[:, None], q_rank[:, None]
    if mask == "full":
        return torch.ones(len(q_index), len(k_index), dtype=torch.bool, device=q_index.device)
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


def plan_ref(frame_offsets, prefix_len, suffix_len, mask, cross, block_q, block_k):
    """The planner in NumPy, by evaluating the mask tile by tile: the specification of the C++ one, and its stand-in."""
    q_tiles, k_ptr, k_tiles, start = [], [0], [], 0
    for sequence, (first, last) in enumerate(pairwise(frame_offsets)):
        frames = list(zip(prefix_len[first:last].tolist(), suffix_len[first:last].tolist(), strict=True))
        layout = SequenceLayout.from_codes([frames], mask, cross)
        index = torch.arange(layout.total)
        parts = np.cumsum([0] + [n for frame in frames for n in frame if n])
        for q0, q1 in _tile_bounds(layout.total, parts, block_q):
            rows = slice(q0, q1)
            seen = visible(
                layout.mask, layout.cross, index[rows], layout.frame[rows], layout.rank[rows], index, layout.frame,
                layout.rank,
            ).numpy()  # fmt: skip
            for k0, k1 in _tile_bounds(layout.total, parts, block_k):
                if seen[:, k0:k1].any():
                    k_tiles.append((start + k0, start + k1, int(seen[:, k0:k1].all())))
            q_tiles.append((sequence, start + q0, start + q1, 0))
            k_ptr.append(len(k_tiles))
        start += layout.total
    as_int = lambda rows, width: np.array(rows, dtype=np.int32).reshape(-1, width)  # noqa: E731
    return as_int(q_tiles, 4), np.array(k_ptr, dtype=np.int32), as_int(k_tiles, 3)


def _tile_bounds(total: int, parts: np.ndarray, block: int) -> list[tuple[int, int]]:
    bounds = parts.tolist() if block == 0 else [*range(0, total, block), total]
    return list(pairwise(bounds)) if total else []

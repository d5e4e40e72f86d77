"""Where the tokens of a ragged batch lie, and which registers are one.

A packed batch holds, sequence by sequence and frame by frame, the frame's patches and then its registers. Several
sequences may come from one sample: guidance needs a conditional and an unconditional one.

Collapse: registers that were overwritten by the same token, without a position, and that the mask treats alike stay
identical through every layer. One token whose key counts m times (key log weight log m) computes the same function.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from flexkernels import SequenceLayout
from flexkernels.layout import cached_tensors
from flexkernels.upload import upload

from .config import Trunk

# what overwrites a register, in the order of the rows that Decoder.embed_registers appends to the codes
TOKENS = ("keep", "prefix", "null")
# masks that treat all registers of a frame alike
_ALIKE = ("full", "frame_causal")


class Member(NamedTuple):
    """One sequence of a packed batch: the sample it is of, and what happens to that sample's registers."""

    sample: int
    keep: int
    prefix_frames: int = 0
    null: bool = False


class Packing:
    """The index tensors of one packed batch.

    Args:
        grids: (frames, rows, columns) in patches, one per sample.
        members: the sequences of the batch.
        registers: N, registers of a frame.
        register_ops: what happens to registers, in order (see :class:`vft.config.TokenizerConfig`).
        trunk: whose mask holds.
        collapse: whether registers that are alike become one token.

    Attributes:
        layout: the :class:`flexkernels.SequenceLayout`; key_log_weight: float32 ``[total]`` or None.
        order: int64 ``[total]``, rows of all samples' patches followed by this batch's registers.
        patch_at, register_at: int64, where patches and registers lie, sequence by sequence.
        grids: (frames, rows, columns) in patches of each sequence.
        register_base: int64 ``[R]``, row of the samples' codes, or that of a token after all codes (TOKENS).
        register_position: int64 ``[R]``, row of the register positions, or the row after all of them (none).
        frames, registers: of the grid of register positions.
    """

    def __init__(self, grids, members, registers: int, register_ops, trunk: Trunk, collapse: bool, device) -> None:
        parts = [
            _registers(grids[s.sample][0], s._replace(sample=0), registers, tuple(register_ops), trunk.mask, collapse)
            for s in members
        ]
        self.grids = [grids[s.sample] for s in members]
        patch_first = np.cumsum([0] + [t * h * w for t, h, w in grids])
        code_first = registers * np.cumsum([0] + [t for t, _, _ in grids])
        position_rows = registers * max(t for t, _, _ in grids)
        order, weight, base, position = [], [], [], []
        for s, part, (t, h, w) in zip(members, parts, self.grids, strict=True):
            count, n = h * w, part.per_frame
            is_patch = np.repeat(np.tile([True, False], t), np.stack([np.full(t, count), n], 1).ravel())
            rows = np.empty(len(is_patch), dtype=np.int64)
            rows[is_patch] = patch_first[s.sample] + np.arange(t * count)
            rows[~is_patch] = patch_first[-1] + sum(map(len, base)) + np.arange(n.sum())
            weights = np.zeros(len(is_patch), dtype=np.float32)
            weights[~is_patch] = np.log(part.count)
            order.append(rows)
            weight.append(weights)
            base.append(np.where(part.token < 0, code_first[s.sample] + part.index, code_first[-1] + part.token))
            position.append(np.where(part.positioned, part.index, position_rows))
        weights = np.concatenate(weight)
        weighted = np.flatnonzero(weights).tolist() or None
        frames = [[(h * w, int(n)) for n in p.per_frame] for (_, h, w), p in zip(self.grids, parts, strict=True)]
        self.layout = SequenceLayout(frames, trunk.mask, dict(trunk.cross_frame or ()), device, weighted_keys=weighted)
        self.frames, self.registers = max(t for t, _, _ in grids), registers
        # modulation rows: (patch, register) for each row of times
        is_register = (np.asarray(self.layout.queries.tokens[2]) >= 0).astype(np.int32)
        samples = np.repeat([s.sample for s in members], np.diff(self.layout.queries.cu_seqlens)).astype(np.int32)
        arrays = (
            np.concatenate(order), np.flatnonzero(is_register == 0), np.flatnonzero(is_register), np.concatenate(base),
            np.concatenate(position), is_register, is_register + 2 * samples, weights,
        )  # fmt: skip
        (
            self.order, self.patch_at, self.register_at, self.register_base, self.register_position, self._is_register,
            self._by_sample, weights,
        ) = upload([torch.from_numpy(x) for x in arrays], device, kept=True)  # fmt: skip
        self.key_log_weight = weights if weighted else None

    def segment(self, times: int) -> torch.Tensor:
        """int32 ``[total]``: each token's row of a modulation table ``[2 * times, ...]``; one time, or one a sample."""
        return self._is_register if times == 1 else self._by_sample


class _Registers:
    """The registers of one sequence that are kept apart, frame by frame.

    index: ``frame * N + register``; token: what overwrote it (an index of TOKENS) or -1; positioned: whether it has its
    positional embedding; count: how many registers it stands for; per_frame: how many of these each frame has.
    """

    def __init__(self, frames: int, member: Member, registers: int, register_ops, mask: str, collapse: bool) -> None:
        token = np.full((frames, registers), -1)
        positioned = np.zeros((frames, registers), dtype=bool)
        for op in register_ops:
            if op == "posemb":
                positioned[:] = True
                continue
            hit = np.zeros_like(positioned)
            if op == "keep":
                hit[:, member.keep :] = True
            elif op == "prefix":
                hit[: member.prefix_frames] = True
            elif member.null:
                hit[:] = True
            token[hit], positioned[hit] = TOKENS.index(op), False
        count = np.ones((frames, registers), dtype=np.int64)
        if collapse and mask in _ALIKE:
            for kind in range(len(TOKENS)):
                alike = (token == kind) & ~positioned
                # a mask that sees everything does not tell frames apart either
                groups = alike.reshape(1, -1) if mask == "full" else alike
                first = groups & (groups.cumsum(1) == 1)
                size = np.broadcast_to(groups.sum(1, keepdims=True), groups.shape)
                count[alike] = np.where(first, size, 0).reshape(alike.shape)[alike]
        held = count > 0
        self.index = np.flatnonzero(held)
        self.token, self.positioned, self.count = token[held], positioned[held], count[held]
        self.per_frame = held.sum(1)


# a training step has hundreds of sequences, of few kinds; 32 KB each at the published size
_registers = lru_cache(1024)(_Registers)


@cached_tensors
def packing(grids, members, registers: int, register_ops, trunk: Trunk, collapse: bool, device) -> Packing:
    """The same :class:`Packing` for the same arguments (all hashable)."""
    return Packing(grids, members, registers, register_ops, trunk, collapse, device)

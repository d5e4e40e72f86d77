"""The guided velocity of a decode: all that does not depend on the state or the time is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layers import Decoder, Modulation
from .modulation import ModulationTable
from .packing import Member, Packing
from .states import Evaluation


class GuidedVelocity:
    """What :func:`vft.solver.sample` calls; conditional and unconditional sequences are computed in one packed call.

    shaped: list of tensors ``[C, T, H, W]`` in the shapes of the latents; plan: from
    :func:`vft.solver.evaluations`; codes, keep, frames, registers: as the codes, keep, prefix_frames and registers of
    :class:`vft.layers.Decoder`, unchecked.
    """

    def __init__(
        self, decoder: Decoder, shaped: Sequence[torch.Tensor], plan: Sequence[Evaluation], codes, keep, frames,
        collapse: bool, registers: int | None,
    ) -> None:  # fmt: skip
        self.decoder, self.shaped, self.codes = decoder, shaped, codes
        self.table = ModulationTable(decoder, [evaluation.t for evaluation in plan])
        members = tuple(Member(i, keep[i], frames[i]) for i in range(len(shaped)))
        # what the packed sequences depend on
        self.key = tuple(x.shape for x in shaped), members, collapse, registers
        self._packed: dict[bool, tuple[Packing, torch.Tensor]] = {}

    def packed(self, guided: bool) -> tuple[Packing, torch.Tensor]:
        """The sequences of an evaluation and their embedded registers, the same in the whole decode."""
        if guided not in self._packed:
            _, conditional, collapse, registers = self.key
            null = tuple(m._replace(null=True) for m in conditional) if guided else ()
            made = self.decoder.packing(self.shaped, conditional + null, collapse, registers)
            self._packed[guided] = made, self.decoder.embed_registers(self.codes, made)
        return self._packed[guided]

    def compute(self, x, packing: Packing, registers: torch.Tensor, modulation: Modulation):
        """Conditional velocities, and unconditional ones where the packing has them, in the decoder's dtype."""
        x = [sample.reshape(shape) for sample, shape in zip(x, self.key[0], strict=True)]
        out = self.decoder.velocity(x, registers, modulation, packing)
        return out[: len(x)], out[len(x) :] or None

    def __call__(self, x, i: int, guided: bool):
        return self.compute(x, *self.packed(guided), self.table[i])

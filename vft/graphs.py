"""CUDA graphs of the decoder's velocity: one launch in place of some hundred."""

from __future__ import annotations

from collections import OrderedDict

import torch

from flexkernels import library

from .capture import capture
from .layers import Decoder, Modulation
from .packing import Packing

# graphs kept, the latest used ones; each holds its own activations
GRAPHS = 8


class VelocityGraph:
    """``decoder.velocity`` of one packing, captured once; a call copies its inputs in and replays.

    Registers stay the same through a decode: those of the call before are not copied again, and must not have been
    changed in place. What a call returns is overwritten by the next one.
    """

    def __init__(self, decoder: Decoder, latents, registers, modulation: Modulation, packed: Packing) -> None:
        self.latents = [x.clone() for x in latents]
        self.given = registers
        self.registers, self.modulation = registers.clone(), Modulation(*(x.clone() for x in modulation))
        # what the graph reads must outlive the packing's own cache
        self.packed = packed
        run = lambda: decoder.velocity(self.latents, self.registers, self.modulation, packed)  # noqa: E731
        self.graph, self.out = capture(run)

    def __call__(self, latents, registers, modulation: Modulation) -> list[torch.Tensor]:
        if registers is not self.given:
            self.registers.copy_(registers)
            # held, so that no other tensor takes its place
            self.given = registers
        for mine, given in zip((*self.latents, *self.modulation), (*latents, *modulation), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.out


class VelocityGraphs:
    """The graphs of one decoder, made when a packing is first seen on a CUDA device; elsewhere the plain call."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple, VelocityGraph] = OrderedDict()

    def __reduce__(self):
        # of copies and pickles: graphs hold addresses of one model's weights
        return VelocityGraphs, ()

    def __call__(self, decoder: Decoder, latents, registers, modulation, packed: Packing) -> list[torch.Tensor]:
        weight = decoder.head.weight
        if weight.device.type != "cuda":
            return decoder.velocity(latents, registers, modulation, packed)
        key = (id(packed), weight.data_ptr(), weight.dtype, library.current_backend())
        if key not in self._graphs:
            if len(self._graphs) == GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = VelocityGraph(decoder, latents, registers, modulation, packed)
        self._graphs.move_to_end(key)
        return self._graphs[key](latents, registers, modulation)

"""CUDA graphs of the sampler: an evaluation, from the rounding of the state to the next state, is one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from flexkernels import library

from .capture import record
from .layers import Modulation
from .packing import Packing
from .states import Flow, Settings, Turn
from .velocity import GuidedVelocity

# runs kept, the latest used ones; each holds its state and the activations of its graphs
KEPT = 4


class Run:
    """The buffers of a decode and the graphs that read and write them, for all decodes of its shapes and settings.

    Turns of one kind differ in their numbers, which a graph reads from ``scalars``, and in the modulations of their
    time: both are copied in before each turn. The first turn of a kind makes the calls that a graph would, which
    compiles and loads their kernels; the second is captured.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.flow = Flow(settings, device)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: set[tuple] = set()
        self.scalars = self.modulation = None
        # {guided: (packing, registers in their place, those they are copies of)}: graphs read what packings hold
        self.sequences: dict[bool, tuple[Packing, torch.Tensor, torch.Tensor]] = {}

    def begin(self, noise, prefix, velocity: GuidedVelocity, turns: Sequence[Turn]) -> None:
        self.flow.begin(noise, prefix)
        self.velocity, self.turns = velocity, turns
        # one copy to the device for the whole decode
        rows = [self.flow.scalars(turn) for turn in turns]
        self.rows = torch.tensor(rows, dtype=torch.float32).to(noise[0].device)

    def advance(self, i: int) -> None:
        """The turn i."""
        turn = self.turns[i]
        kind = self.flow.kind(turn)
        inputs = self._load(i, turn.fresh)
        if kind not in self.graphs:
            velocity = lambda x, fresh: self.velocity.compute(x, *inputs)  # noqa: E731
            step = partial(self.flow.advance, velocity, turn, self.scalars)
            if kind not in self.seen:
                step()
                self.seen.add(kind)
                return
            self.graphs[kind], _ = record(step, self.pool)
        self.graphs[kind].replay()

    def _load(self, i: int, guided: bool) -> tuple[Packing, torch.Tensor, Modulation]:
        """Brings what the turn i reads to where graphs read it."""
        if self.modulation is None:
            self.scalars = self.rows[i].clone()
            self.modulation = Modulation(*(part.clone() for part in self.velocity.table[i]))
        else:
            self.scalars.copy_(self.rows[i])
            for mine, given in zip(self.modulation, self.velocity.table[i], strict=True):
                mine.copy_(given)
        packing, registers = self.velocity.packed(guided)
        if guided not in self.sequences:
            self.sequences[guided] = packing, registers.clone(), registers
        packing, mine, given = self.sequences[guided]
        if registers is not given:
            mine.copy_(registers)
            # held, so that no other tensor takes its place
            self.sequences[guided] = packing, mine, registers
        return packing, mine, self.modulation

    def end(self) -> None:
        """Lets go of what belongs to one decode."""
        self.velocity = self.turns = self.rows = None


class StepGraphs:
    """The runs of one decoder, kept between calls."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Run] = OrderedDict()

    def __reduce__(self):
        # of copies and pickles: graphs hold addresses of one model's weights
        return StepGraphs, ()

    @contextmanager
    def run(self, velocity: GuidedVelocity, settings: Settings) -> Iterator[Run]:
        """A run of these settings, which is nobody else's until it ends."""
        weights = (*velocity.decoder.parameters(), *velocity.decoder.buffers())
        held = tuple((t.data_ptr(), t.dtype) for t in weights)
        device = velocity.codes.device
        # tensors made in inference mode cannot be written outside of it
        mode = library.current_backend(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()
        # a stream comes to a decode when it is through with the one before, another one does not wait for that
        key = velocity.key, settings, held, mode, _stream(device)
        run = self._kept.pop(key, None) or Run(settings, device)
        try:
            yield run
        finally:
            run.end()
            self._kept[key] = run
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def _stream(device: torch.device) -> int | None:
    """The stream that work is given to on a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None

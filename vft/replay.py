"""Runs with CUDA graphs, kept between calls: a later call of one shape allocates and captures nothing."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from flexkernels import library, transformer

from .decoding import SHARED_ROWS, Graphs, Request, Sampling, State, contexts

# runs kept, the latest used ones; each holds its caches
KEPT = 2
# lengths of captions that share a run
CONTEXT_BUCKET = 64


class Replays:
    """The states of one model's runs with their graphs, by shape and settings of the sampler."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, tuple[State, Graphs]] = OrderedDict()

    def __reduce__(self):
        # graphs hold addresses of one model's weights: a copy has none
        return Replays, ()

    @contextmanager
    def run(self, model, request: Request, samples: int, sampling: Sampling) -> Iterator[tuple[State, Graphs]]:
        """A state and its graphs at the start of a run; they are this run's alone until it ends."""
        cross = [c and _padded(*c) for c in contexts(model, request, samples, SHARED_ROWS)]
        key = (
            len(request.stops), samples, request.guided, max(request.stops), request.frames * request.levels,
            tuple(sampling.options().values()), cross[0] and cross[0][0].shape, library.current_backend(),
            os.environ.get(transformer.ENVIRONMENT),
            tuple((t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())),
        )  # fmt: skip
        kept = self._kept.pop(key, None)
        if kept is None:
            state = State(model, request, samples, sampling, cross=cross)
            kept = state, Graphs(model, state)
        else:
            kept[0].begin(request, sampling)
            for mine, given in zip(kept[0].cross, cross, strict=True):
                for buffer, value in zip(mine or (), given or (), strict=True):
                    buffer.copy_(value)
        try:
            yield kept
        finally:
            self._kept[key] = kept
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def _padded(k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, ...]:
    more = -k.shape[2] % CONTEXT_BUCKET
    return F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), length

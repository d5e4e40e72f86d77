"""One way to capture a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def capture(run: Callable[[], Any], changed: Sequence[torch.Tensor] = (), pool=None) -> tuple:
    """A torch.cuda.CUDAGraph of ``run``, and what the captured call returned, which a replay overwrites.

    ``run`` is called once before, on a stream of its own, so that kernels are compiled and libraries set up outside of
    the capture; what it did to the tensors ``changed`` is undone. ``pool`` is memory shared with other graphs.
    """
    before = [t.clone() for t in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
    torch.cuda.current_stream().wait_stream(stream)
    return record(run, pool)


def record(run: Callable[[], Any], pool=None) -> tuple:
    """:func:`capture` of what has run before: ``run`` is called for the capture alone, which computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()
    return graph, out

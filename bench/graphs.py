"""Calls inside a CUDA graph: the kernels alone, without the host's time for each call."""

import os
from collections.abc import Callable

import torch

# the scripts of a GPU run on the CPU in its place, to try them where there is no GPU
STANDIN = os.environ.get("FLEXKERNELS_GPU_STANDIN") == "cpu"
# one graph lasts about this long, so that its launch does not count
GRAPH_SECONDS, MOST_CALLS = 0.002, 50


class Calls:
    """`function` captured `count` times in one graph; a call replays it. On a CPU, the stand-in, plain calls."""

    def __init__(self, function: Callable, count: int, device: str):
        self.function, self.count, self.graph = function, count, None
        if device == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            # on the stream of the forward pass, on which autograd runs the backward pass
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                for _ in range(count):
                    function()

    def __call__(self):
        if self.graph is None:
            for _ in range(self.count):
                self.function()
        else:
            self.graph.replay()


def captured(function: Callable, device: str, seconds_of: Callable[[Callable], float]) -> Calls:
    """As many calls in one graph as take GRAPH_SECONDS, at most MOST_CALLS; seconds_of(f) times one call of f.

    Raises what a capture raises: an op waited for the device or copied from the host.
    """
    once = Calls(function, 1, device)
    once()
    seconds = max(seconds_of(once), 1e-7)
    count = max(1, min(MOST_CALLS, round(GRAPH_SECONDS / seconds)))
    return once if count == 1 else Calls(function, count, device)

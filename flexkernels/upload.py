"""Data of the host on a device, by one transfer that the host does not wait for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

# of a tensor's first byte, as torch's own allocations are on a GPU
_ALIGNED = 512


def upload(tensors: Sequence[torch.Tensor], device: torch.device, *, kept: bool = False) -> list[torch.Tensor]:
    """CPU tensors as tensors on ``device``, contiguous, in the order of its stream; on the CPU themselves.

    A copy out of pageable memory would wait for all work on a GPU: they are gathered in pinned memory first. What is
    ``kept`` may be read by other streams later: the host waits until it is there, not for what the GPU computes.

    Raises RuntimeError in the capture of a CUDA graph, whose replays would read that memory after it was given back.
    """
    if device.type == "cpu":
        return list(tensors)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("layouts must be made before the capture of a CUDA graph: make the call once before it")
    starts, end = [], 0
    for x in tensors:
        starts.append(end)
        end += -(-x.numel() * x.element_size() // _ALIGNED) * _ALIGNED
    flat = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, part in zip(tensors, _views(flat, starts, tensors), strict=True):
        part.copy_(x)
    if not kept or device.type != "cuda":
        return _views(flat.to(device, non_blocking=True), starts, tensors)
    stream = _copies(device)
    with torch.cuda.stream(stream):
        there = flat.to(device, non_blocking=True)
    stream.synchronize()
    there.record_stream(torch.cuda.current_stream(device))
    return _views(there, starts, tensors)


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own, on which nothing is computed."""
    return torch.cuda.Stream(device)


def _views(flat: torch.Tensor, starts: list[int], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = [flat[start : start + x.numel() * x.element_size()] for start, x in zip(starts, like, strict=True)]
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)]

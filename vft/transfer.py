"""Data on their way between the host and a device, which both go on computing meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Uploads:
    """Copies to a device. On a GPU those of the host's tensors take a stream of their own, beside what it computes, and
    out of pinned memory, so that the host does not wait; what is then given to the GPU waits for them there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __reduce__(self):
        # a stream is neither copied nor pickled
        return Uploads, (self.device,)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # what lies on a GPU is in the order of its current stream
        if self.stream is None or any(x.device.type != "cpu" for x in tensors):
            return [x.to(self.device) for x in tensors]
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            pinned = (x if x.is_pinned() else x.pin_memory() for x in tensors)
            there = [x.to(self.device, non_blocking=True) for x in pinned]
            copied = self.stream.record_event()
        computing.wait_event(copied)
        for x in there:
            # its memory is free again when that stream has passed its last use
            x.record_stream(computing)
        return there


class Download:
    """A tensor on its way to the host, which waits for it in :meth:`wait` alone."""

    def __init__(self, x: torch.Tensor) -> None:
        self.host, self.copied = x, None
        if x.is_cuda:
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x, non_blocking=True)
            self.copied = torch.cuda.current_stream(x.device).record_event()

    def wait(self) -> torch.Tensor:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host

"""Packets to frames, over damage: what cannot be decoded is left out and counted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain

from vft.deferred import av

from .container import is_cut, stated_seconds
from .frames import VideoError


class Loss:
    """What could not be read of a file; with ``strict`` the first loss raises VideoError."""

    def __init__(self, path: str | os.PathLike, container, stream, strict: bool, start: float) -> None:
        self.name, self.strict, self.start = os.fspath(path), strict, start
        self.container, self.stream = container, stream
        self.packets, self.damaged, self.end = 0, 0, 0.0
        self.cut, self.ended, self.error = False, False, None
        if is_cut(self.name, container.format.name):
            self.cuts(None)

    def cuts(self, error: Exception | None) -> None:
        """The file cannot be read on."""
        self.cut = True
        self._raise(error, "the file ends before its last frame")

    def damages(self, error: Exception) -> None:
        """A packet cannot be decoded."""
        self.damaged += 1
        self._raise(error, error.strerror)

    def _raise(self, error: Exception | None, reason: str) -> None:
        self.error = self.error or error
        if self.strict:
            raise VideoError(f"{self.name}: damaged ({reason})") from error

    def describe(self) -> list[str]:
        """A line, or none where nothing was lost; the end of a file counts once it has been reached."""
        parts = [f"{self.damaged} damaged packet{'s' * (self.damaged > 1)}"] if self.damaged else []
        if self.cut and self.ended:
            frames = 0 if self.start else self.stream.frames - self.packets
            seconds = max(0.0, stated_seconds(self.container, self.stream) - self.end)
            what = f"{frames} of {self.stream.frames} frames" if frames > 0 else f"about {seconds:.1f} s"
            parts.append(f"{what} behind its cut end")
        return [f"{' and '.join(parts)} lost"] if parts else []


def decoded(stream, packets: Iterable, loss: Loss) -> Iterator[av.VideoFrame]:
    """The frames of a stream in display order.

    Raises:
        FFmpegError: nothing at all could be decoded.
    """
    found, origin = False, float((stream.start_time or 0) * stream.time_base)
    # without a packet the decoder gives the frames that it holds
    for packet in chain(packets, [None]):
        if packet is not None and packet.is_corrupt and loss.cut:
            continue
        loss.packets += packet is not None and packet.size > 0
        try:
            frames = stream.decode(packet)
        except av.error.EOFError:
            continue
        except av.error.FFmpegError as error:
            loss.damages(error)
            continue
        for frame in frames:
            found = True
            if frame.pts is not None:
                loss.end = max(loss.end, frame.time - origin)
            yield frame
    loss.ended = True
    if not found and loss.error is not None:
        raise loss.error

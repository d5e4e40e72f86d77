"""Animated WebP, which FFmpeg's own decoder refuses, read by Pillow as frames with their times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from vft.deferred import Image, av

from .frames import VideoError
from .timing import measured_rate

TIME_BASE = Fraction(1, 1000)


def is_animated(path: str | os.PathLike, container) -> bool:
    if container.format.name != "webp_pipe":
        return False
    with open(path, "rb") as file:
        head = file.read(32)
    # a VP8X chunk with the animation flag
    return head[12:16] == b"VP8X" and bool(head[20:21] and head[20] & 2)


def frames(path: str | os.PathLike) -> Iterator[av.VideoFrame]:
    """RGBA frames whose pts and duration are in TIME_BASE.

    Raises:
        VideoError: Pillow cannot read the file.
    """
    now = 0
    for pixels, duration in _pictures(path):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
        frame.pts, frame.duration, frame.time_base = now, duration, TIME_BASE
        now += duration
        yield frame


def rate(path: str | os.PathLike) -> Fraction | None:
    """Frames a second by the median interval; None where there is one frame."""
    times = [0]
    for _, duration in _pictures(path):
        times.append(times[-1] + duration)
    return measured_rate(times[:-1], TIME_BASE)


def _pictures(path) -> Iterator[tuple[np.ndarray, int]]:
    try:
        with Image.open(path) as image:
            for index in range(image.n_frames):
                image.seek(index)
                pixels = np.asarray(image.convert("RGBA"))
                yield pixels, max(1, int(image.info.get("duration", 100)))
    except (OSError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{os.fspath(path)}: not a video, or a damaged one ({error})") from error

"""Reading a video file: its frames as they are shown, on a uniform grid in time."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain, islice

import numpy as np
import torch

from vft.deferred import av

from . import webp
from .container import audio_stream, opened, packets_of
from .decode import Loss, decoded
from .frames import Video, VideoError, VideoStream, VideoWarning, check_size, fit
from .picture import Pictures, whole
from .timing import DEFAULT_RATE, HIGHEST_RATE, LOWEST_RATE, choose_rate, on_grid, steady


@contextmanager
def open_video(
    path: str | os.PathLike,
    size: int | None = None,
    start: float = 0.0,
    fps: float | None = None,
    strict: bool = False,
    warn: bool = True,
) -> Iterator[VideoStream]:
    """Open a video file; its frames are decoded as they are asked for, inside the ``with`` block.

    Frames are those of a uniform grid in time, whatever the file's own timestamps: upright and with square pixels as
    the file says, fields joined, high dynamic range mapped to SDR, transparent parts over black, 8-bit RGB. See
    docs/video.md for each. A still picture is a video of one frame.

    Args:
        size: see :func:`fit`; frames are resized one by one as they are read. None keeps the source size.
        start: seconds; begin at the frame that is shown then, or at the last one of a video that is shorter.
        fps: frames a second of the grid, 0.01 to 1000; by default the file's own rate.
        strict: refuse a file of which a part is damaged or missing, at the place where that shows. By default the
            other frames are used.
        warn: what was lost or changed is a :class:`VideoWarning` at the end, one a file; it stands in
            ``VideoStream.warnings`` in any case.

    Raises:
        VideoError: the file is missing, is not a video, or has no frame; or ``strict`` refuses it.
        ValueError: ``size``, ``start`` or ``fps`` is out of range.
    """
    if size is not None:
        check_size(size)
    if not 0 <= start < math.inf:
        raise ValueError(f"start must be at least 0 seconds, got {start}")
    rate = None if fps is None else _rate(fps)
    notes: list[str] = []
    with opened(path) as (container, stream):
        loss = Loss(path, container, stream, strict, start)
        origin = None
        if webp.is_animated(path, container):
            frames, time_base = webp.frames(path), webp.TIME_BASE
            rate = rate or webp.rate(path) or DEFAULT_RATE
        else:
            packets, time_base = packets_of(container, stream, loss.cuts), stream.time_base
            if rate is None:
                rate, packets = choose_rate(stream, packets)
            # without timestamps the time is known only from the beginning on
            if start > 0 and stream.start_time is not None:
                _seek(container, stream, start)
                packets, origin = packets_of(container, stream, loss.cuts), stream.start_time
            frames = decoded(stream, packets, loss)
        frames = whole(steady(frames, time_base, rate, notes.append, origin), time_base)
        frames = on_grid(frames, time_base, rate, int(start * rate + 1e-6))
        first = next(frames, None)
        if first is None:
            raise VideoError(f"{os.fspath(path)}: the video has no frames")
        pictures = Pictures(first, stream.sample_aspect_ratio, notes.append)
        shown = _sized(map(pictures, chain([first], frames)), size)
        try:
            yield VideoStream(
                shown, float(rate), pictures.height, pictures.width, notes, audio_stream(container) is not None
            )
        finally:
            notes += loss.describe()
        if warn and notes:
            warnings.warn(f"{os.fspath(path)}: {'; '.join(notes)}", VideoWarning, stacklevel=3)


def _seek(container, stream, start: float) -> None:
    # a format that cannot be searched is read from its beginning
    with suppress(av.error.FFmpegError):
        container.seek(round((float(stream.start_time * stream.time_base) + start) * av.time_base))


def _rate(fps: float) -> Fraction:
    if not LOWEST_RATE <= fps <= HIGHEST_RATE:
        raise ValueError(f"fps must be between {float(LOWEST_RATE):g} and {HIGHEST_RATE}, got {fps}")
    return Fraction(fps).limit_denominator(1001)


def _sized(pictures: Iterable[np.ndarray], size: int | None) -> Iterator[torch.Tensor]:
    before, frame = None, None
    for picture in pictures:
        if picture is not before:
            before, frame = picture, torch.from_numpy(picture)
            frame = frame if size is None else fit(frame[None], size)[0]
        yield frame


def read_video(
    path: str | os.PathLike,
    size: int | None = None,
    max_frames: int | None = None,
    fps: float | None = None,
    strict: bool = False,
) -> Video:
    """Read a video file whole; see :func:`open_video`.

    Args:
        max_frames: stop after this many frames.

    Raises:
        VideoError: the file is missing, is not a video, or has no frame; or ``strict`` refuses it.
        ValueError: ``size``, ``max_frames`` or ``fps`` is out of range.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    with open_video(path, size, fps=fps, strict=strict) as video:
        frames = torch.stack(list(islice(video.frames, max_frames)))
    return Video(frames, video.fps, video.height, video.width, tuple(video.warnings))

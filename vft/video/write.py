"""Writing a video file: H.264 with its colours tagged, or GIF; beside it the audio track of another file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from itertools import chain

import numpy as np
import torch

from vft.deferred import Image, av
from vft.files import replacing

from .audio import Track
from .frames import VideoWarning, check_frames
from .picture import HD_LINES

OUTPUT_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}
# a delay of 1/100 s is shown as 1/10 s by browsers
GIF_RATE = 50


def write_video(
    path: str | os.PathLike,
    frames: torch.Tensor | Iterable[torch.Tensor],
    fps: float,
    quality: int = 18,
    audio: str | os.PathLike | None = None,
) -> int:
    """Write uint8 ``[T, H, W, 3]`` frames, or an iterable of such pieces, and return the number of frames written.

    The suffix decides the format. ``.mp4``, ``.mov`` and ``.mkv`` hold H.264 (MPEG-4 part 2 where FFmpeg was built
    without libx264) in yuv420p, which plays everywhere but needs even sizes: an odd side is padded by repeating its
    last row or column. From 720 lines on the colours are BT.709, below BT.601, in limited range, and tagged so.
    ``.gif`` has a palette per frame and times in 1/100 s; see :func:`output_rate`. An existing file is replaced once
    the new one is complete; on any error nothing is left behind.

    Args:
        fps: frames per second, 0.01 to 1000; kept to a fraction with a denominator up to 1001.
        quality: the encoder's rate factor, 0 (best) to 51 (smallest). Unused for GIF.
        audio: a file whose audio track is copied beside the frames.

    Raises:
        ValueError: suffix, frame shape or dtype, fps or quality is wrong, or there is no frame; audio for a GIF, or a
            file without an audio track.
        OSError: the file cannot be written.
    """
    container_format = output_format(path)
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must be between 0.01 and 1000, got {fps}")
    if not 0 <= quality <= 51:
        raise ValueError(f"quality must be between 0 and 51, got {quality}")
    is_gif = container_format == "gif"
    if is_gif and audio is not None:
        raise ValueError("audio must be None for a GIF, which has no sound")
    images = _images([frames] if isinstance(frames, torch.Tensor) else frames)
    if is_gif:
        images, fps = _thinned(images, fps, path), output_rate(path, fps)
    first = next(images, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    convert = _gif_frame if is_gif else _even_frame
    count = 0
    try:
        with (
            nullcontext() if audio is None else Track.opened(audio) as track,
            replacing(path) as temporary,
            av.open(f"file:{temporary}", "w", format=container_format) as container,
        ):
            stream = _add_stream(container, container_format, first.shape, fps, quality)
            copy = None if track is None else track.copier(container)
            for image in chain([first], images):
                container.mux(stream.encode(convert(image)))
                count += 1
                if copy is not None:
                    copy(count / fps)
            container.mux(stream.encode())
            if copy is not None:
                copy(None)
    except av.error.FFmpegError as error:
        raise OSError(f"{os.fspath(path)}: cannot be written ({error.strerror})") from error
    return count


def output_rate(path: str | os.PathLike, fps: float) -> float:
    """The rate that :func:`write_video` writes: ``fps``, but for a GIF at most 50."""
    return min(fps, GIF_RATE) if output_format(path) == "gif" else fps


def _thinned(images: Iterator[np.ndarray], fps: float, path) -> Iterator[np.ndarray]:
    """The frames that a GIF can show, the first of each of its delays."""
    if fps > GIF_RATE:
        warnings.warn(
            f"{os.fspath(path)}: a GIF shows at most {GIF_RATE} frames a second, so {fps:g} become {GIF_RATE}",
            VideoWarning,
            stacklevel=3,
        )
    shown = -1
    for index, image in enumerate(images):
        slot = int(index * min(1, GIF_RATE / fps) + 1e-9)
        if slot > shown:
            yield image
        shown = slot


def output_format(path: str | os.PathLike) -> str:
    """FFmpeg's name of the container that :func:`write_video` uses for a file name.

    Raises:
        ValueError: the suffix is not known.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in OUTPUT_FORMATS:
        raise ValueError(f"video output must end in {', '.join(OUTPUT_FORMATS)}, got {os.fspath(path)!r}")
    return OUTPUT_FORMATS[suffix]


def _images(pieces: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    shape = None
    for piece in pieces:
        check_frames(piece)
        shape = shape or piece.shape[1:]
        if piece.shape[1:] != shape:
            raise ValueError(f"frames must keep one size, got {list(shape)} then {list(piece.shape[1:])}")
        yield from piece.cpu().numpy()


def _add_stream(container, container_format: str, shape: tuple[int, ...], fps: float, quality: int):
    height, width, _ = shape
    rate = Fraction(fps).limit_denominator(1001)
    if container_format == "gif":
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        return stream
    if "libx264" in av.codec.codecs_available:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(quality)})
    else:
        scale = 1 + round(quality * 30 / 51)
        stream = container.add_stream("mpeg4", rate=rate, options={"qmin": str(scale), "qmax": str(scale)})
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    codec, system = stream.codec_context, _system(height)
    codec.colorspace = codec.color_primaries = codec.color_trc = system
    codec.color_range = av.video.reformatter.ColorRange.MPEG
    return stream


def _system(height: int) -> int:
    """BT.709 or BT.601 (525 lines) in the numbers of ITU-T H.273, the same for matrix, primaries and transfer."""
    return 1 if height >= HD_LINES else 6


def _even_frame(image: np.ndarray) -> av.VideoFrame:
    height, width, _ = image.shape
    image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    reformatter = av.video.reformatter
    matrix = reformatter.Colorspace.ITU709 if _system(height) == 1 else reformatter.Colorspace.ITU601
    return frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=reformatter.ColorRange.MPEG)


def _gif_frame(image: np.ndarray) -> av.VideoFrame:
    indexed = Image.fromarray(image).quantize(256)
    colours = np.array(indexed.getpalette(), dtype=np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), dtype=np.uint8)
    palette[:, 0] = 255
    palette[: len(colours), 1:] = colours
    return av.VideoFrame.from_ndarray((np.array(indexed), palette), format="pal8")

"""Video files in and out (PyAV), and the step between 8-bit frames and what a model takes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F

from vft.deferred import Image, ImageDraw, ImageFont, av
from vft.files import replacing

DEFAULT_FPS = 25.0
PATCH = 16

# text that FFmpeg draws as a video, and lists of other files, which may lie on the network
_REFUSED = {"tty", "hls", "dash", "concat", "sdp", "image2", "rtsp", "rtp"}
OUTPUT_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}


class VideoError(ValueError):
    """A file cannot be read as a video; the message names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, uint8 ``[T, H, W, 3]`` RGB, and its frame rate.

    ``height`` and ``width`` are those of the source in pixels, upright and before any resize.
    """

    frames: torch.Tensor
    fps: float
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class VideoStream:
    """An open video: ``frames`` yields uint8 ``[H, W, 3]`` one by one; the rest is as in :class:`Video`."""

    frames: Iterator[torch.Tensor]
    fps: float
    height: int
    width: int


@contextmanager
def open_video(path: str | os.PathLike, size: int | None = None, start: float = 0.0) -> Iterator[VideoStream]:
    """Open the first video stream of a file; its frames are decoded as they are asked for, inside the ``with`` block.

    The frames are turned upright as the file's rotation says. Gray becomes RGB, alpha is dropped, more than 8 bits are
    rounded to 8, pixels are taken as square. Frames are taken in display order at the average rate; a file without a
    rate counts as 25 fps. A still picture is a video of one frame. MP4 and MOV files that end too early are refused;
    formats that carry no list of frames (MKV, WebM, TS) give the frames that are there.

    Args:
        size: see :func:`fit`; frames are resized one by one as they are read. None keeps the source size.
        start: seconds; begin at the frame that is shown then, or at the last one of a video that is shorter.

    Raises:
        VideoError: the file is missing, is not a video, is damaged, or has no frame.
        ValueError: ``size`` or ``start`` is out of range.
    """
    if size is not None:
        _check_size(size)
    if not 0 <= start < math.inf:
        raise ValueError(f"start must be at least 0 seconds, got {start}")
    with _opened(path) as (container, stream):
        pictures = map(_upright, _frames_from(container, stream, start))
        first = next(pictures, None)
        if first is None:
            raise VideoError(f"{path}: the video has no frames")
        height, width = first.shape[:2]
        yield VideoStream(_sized(path, chain([first], pictures), size), _rate(stream), height, width)


def _frames_from(container, stream, start: float) -> Iterator[av.VideoFrame]:
    """Frames in display order from the one shown at ``start`` on."""
    if start == 0:
        yield from container.decode(stream)
        return
    origin = float((stream.start_time or 0) * stream.time_base)
    # a format that cannot be searched is read from its beginning
    with suppress(av.error.FFmpegError):
        container.seek(round((origin + start) * av.time_base))
    held, shown = None, False
    for frame in container.decode(stream):
        shown = shown or frame.time is None or frame.time - origin > start
        if shown and held is not None:
            yield held
        held = frame
    if held is not None:
        yield held


def _sized(path, pictures: Iterator[np.ndarray], size: int | None) -> Iterator[torch.Tensor]:
    shape = None
    for number, picture in enumerate(pictures):
        frame = torch.from_numpy(picture)
        frame = frame if size is None else fit(frame[None], size)[0]
        shape = shape or frame.shape
        if frame.shape != shape:
            raise VideoError(f"{path}: the frame size changes from {shape[1]}x{shape[0]} at frame {number}")
        yield frame


def read_video(path: str | os.PathLike, size: int | None = None, max_frames: int | None = None) -> Video:
    """Read the first video stream of a file whole; see :func:`open_video`.

    Args:
        max_frames: stop after this many frames.

    Raises:
        VideoError: the file is missing, is not a video, is damaged, or has no frame.
        ValueError: ``size`` or ``max_frames`` is out of range.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    with open_video(path, size) as video:
        return Video(torch.stack(list(islice(video.frames, max_frames))), video.fps, video.height, video.width)


def cut_chunks(frames: Iterable[torch.Tensor], size: int, overlap: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Cut a stream of frames ``[...]`` into chunks ``[size, ...]`` that share ``overlap`` frames.

    Holds one chunk at a time. Yields each chunk and how many of its frames no chunk before it held. The last chunk is
    filled by repeating the last frame; a single frame is a chunk of one.

    Raises:
        ValueError: there is no frame.
    """
    held, new, first = [], 0, True
    for frame in frames:
        if len(held) == size:
            yield torch.stack(held), new
            held, new, first = held[size - overlap :], 0, False
        held.append(frame)
        new += 1
    if not held:
        raise ValueError("video must have at least one frame, got 0")
    if not first or len(held) > 1:
        held += held[-1:] * (size - len(held))
    yield torch.stack(held), new


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video stream, without decoding it. ``frames`` is 0 where the file does not say."""

    container: str
    codec: str
    height: int
    width: int
    frames: int
    fps: float


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Facts of the first video stream of a file, as stored (rotation not applied).

    Raises:
        VideoError: the file is missing, is not a video, or ends too early.
    """
    with _opened(path) as (container, stream):
        codec = stream.codec_context
        return VideoInfo(container.format.name, codec.name, codec.height, codec.width, stream.frames, _rate(stream))


def _read_options() -> dict[str, str]:
    formats = av.formats_available - _REFUSED
    return {"protocol_whitelist": "file", "format_whitelist": ",".join(sorted(formats))}


@contextmanager
def _opened(path) -> Iterator[tuple]:
    """Open a file and find its video stream; FFmpeg's errors become VideoError inside the block too."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise VideoError(f"{name}: {'not a file' if os.path.exists(name) else 'no such file'}")
    if os.path.getsize(name) == 0:
        raise VideoError(f"{name}: the file is empty")
    try:
        # "file:" because a colon in the name would otherwise end a protocol
        with av.open(f"file:{name}", options=_read_options(), metadata_errors="ignore") as container:
            pictures = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & pictures), None)
            if stream is None:
                raise VideoError(f"{name}: no video stream in it")
            if "mp4" in container.format.name and _is_cut(name):
                raise VideoError(f"{name}: truncated (the file ends before its last frame)")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise VideoError(f"{name}: not a video, or a damaged one ({error.strerror})") from error


def _is_cut(name: str) -> bool:
    """Whether an MP4 or MOV file ends inside a top-level box that holds the index or the frames."""
    position, end = 0, os.path.getsize(name)
    with open(name, "rb") as file:
        while position < end:
            file.seek(position)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            # 0: the box goes on to the end of the file; below 8: not a box
            if length < 8:
                return False
            position += length
            if position > end:
                return kind in (b"moov", b"mdat", b"moof")
    return False


def _rate(stream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else DEFAULT_FPS


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB pixels [H, W, 3], turned by the multiple of 90 degrees nearest to the frame's display matrix."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def write_video(
    path: str | os.PathLike,
    frames: torch.Tensor | Iterable[torch.Tensor],
    fps: float,
    quality: int = 18,
) -> int:
    """Write uint8 ``[T, H, W, 3]`` frames, or an iterable of such pieces, and return the number of frames written.

    The suffix decides the format. ``.mp4``, ``.mov`` and ``.mkv`` hold H.264 (MPEG-4 part 2 where FFmpeg was built
    without libx264) in yuv420p, which plays everywhere but needs even sizes: an odd side is padded by repeating its
    last row or column. ``.gif`` has a palette per frame and times in 1/100 s, so its rate is rounded. An existing file
    is replaced once the new one is complete; on any error nothing is left behind.

    Args:
        fps: frames per second, 0.01 to 1000; kept to a fraction with a denominator up to 1001.
        quality: the encoder's rate factor, 0 (best) to 51 (smallest). Unused for GIF.

    Raises:
        ValueError: suffix, frame shape or dtype, fps or quality is wrong, or there is no frame.
        OSError: the file cannot be written.
    """
    container_format = output_format(path)
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must be between 0.01 and 1000, got {fps}")
    if not 0 <= quality <= 51:
        raise ValueError(f"quality must be between 0 and 51, got {quality}")
    images = _images([frames] if isinstance(frames, torch.Tensor) else frames)
    first = next(images, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    convert = _gif_frame if container_format == "gif" else _even_frame
    count = 0
    try:
        with replacing(path) as temporary, av.open(f"file:{temporary}", "w", format=container_format) as container:
            stream = _add_stream(container, container_format, first.shape, fps, quality)
            for image in chain([first], images):
                container.mux(stream.encode(convert(image)))
                count += 1
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise OSError(f"{os.fspath(path)}: cannot be written ({error.strerror})") from error
    return count


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
        _check_frames(piece)
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
    return stream


def _even_frame(image: np.ndarray) -> av.VideoFrame:
    height, width, _ = image.shape
    image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def _gif_frame(image: np.ndarray) -> av.VideoFrame:
    indexed = Image.fromarray(image).quantize(256)
    colours = np.array(indexed.getpalette(), dtype=np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), dtype=np.uint8)
    palette[:, 0] = 255
    palette[: len(colours), 1:] = colours
    return av.VideoFrame.from_ndarray((np.array(indexed), palette), format="pal8")


def fit(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Crop the centred square of uint8 ``[T, H, W, 3]`` (the shorter side decides) and resize it, see :func:`resize`.

    Returns uint8 ``[T, size, size, 3]``; what lies outside the square is cut away.

    Raises:
        ValueError: ``size`` is not a positive multiple of 16, or frames have another shape.
    """
    _check_size(size)
    _check_frames(frames)
    side = min(frames.shape[1:3])
    return resize(_crop(frames, side, side), size, size)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 ``[T, H, W, 3]`` to ``[T, height, width, 3]``: bicubic, antialiased, rounded."""
    _check_frames(frames)
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    # 8-bit antialiased resizing exists on the CPU only
    pixels = frames.permute(0, 3, 1, 2).cpu()
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return pixels.permute(0, 2, 3, 1).contiguous().to(frames.device)


def preprocess(frames: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Frames as a model takes them: uint8 ``[T, H, W, 3]`` -> float32 ``[3, T, H', W']`` in [-1, 1].

    With ``size``, frames go through :func:`fit`; without, each side is cropped around the centre to a multiple of 16.

    Raises:
        ValueError: frames have another shape, dtype, no frame, or a side below 16 and no ``size``.
    """
    _check_frames(frames)
    if frames.shape[0] == 0:
        raise ValueError("frames must hold at least one frame, got none")
    if size is not None:
        frames = fit(frames, size)
    else:
        height, width = (side - side % PATCH for side in frames.shape[1:3])
        if not height or not width:
            raise ValueError(f"frames must be at least {PATCH} pixels on each side, got {list(frames.shape[1:3])}")
        frames = _crop(frames, height, width)
    return frames.permute(3, 0, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Model output as frames: float ``[3, T, H, W]`` or ``[1, 3, T, H, W]`` in [-1, 1] -> uint8 ``[T, H, W, 3]``.

    Values outside the range are clipped.

    Raises:
        ValueError: another shape, or a value that is NaN.
    """
    if video.dim() == 5 and video.shape[0] == 1:
        video = video[0]
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(f"video must have shape [3, T, H, W] or [1, 3, T, H, W], got {list(video.shape)}")
    video = video.detach().to(torch.float32)
    if torch.isnan(video).any():
        raise ValueError("video must be free of NaN")
    return video.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def contact_sheet(
    rows: list[tuple[str, torch.Tensor]], columns: int = 8, tile: int = 128, footer: str = ""
) -> Image.Image:
    """A picture with one labelled row for each video, its frames evenly spaced over time from first to last.

    Args:
        rows: (label, uint8 ``[T, H, W, 3]``); a label may have several lines. Rows may differ in length and size.
        columns: frames in a row; a shorter video shows each of its frames once.
        tile: height of a frame in the picture, in pixels.
        footer: a line of small text under the rows.

    Raises:
        ValueError: no rows, no columns, or frames of another shape or dtype.
    """
    if not rows or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {len(rows)} and {columns}")
    font = ImageFont.load_default(size=max(10, tile // 8))
    strips = [(label, _tiles(frames, columns, tile)) for label, frames in rows]
    gap = max(2, tile // 32)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 4 * gap + max(math.ceil(measure.multiline_textbbox((0, 0), label, font=font)[2]) for label, _ in strips)
    width = margin + max(sum(image.width + gap for image in images) for _, images in strips)
    bottom = gap + len(strips) * (tile + gap)
    small = ImageFont.load_default(size=max(10, tile // 10))
    sheet = Image.new("RGB", (width, bottom + (2 * small.size if footer else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, bottom + small.size), footer, fill="#606060", font=small, anchor="lm")
    for row, (label, images) in enumerate(strips):
        top = gap + row * (tile + gap)
        draw.multiline_text((2 * gap, top + tile // 2), label, fill="#202020", font=font, anchor="lm")
        left = margin
        for image in images:
            sheet.paste(image, (left, top))
            left += image.width + gap
    return sheet


def _tiles(frames: torch.Tensor, columns: int, tile: int) -> list[Image.Image]:
    _check_frames(frames)
    count, height, width, _ = frames.shape
    if count == 0:
        raise ValueError("rows must hold at least one frame each, got none")
    chosen = torch.linspace(0, count - 1, min(columns, count)).round().long()
    size = (max(1, round(tile * width / height)), tile)
    return [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames[chosen].cpu().numpy()]


def _crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width].contiguous()


def _check_size(size: int) -> None:
    if size < PATCH or size % PATCH:
        raise ValueError(f"size must be a positive multiple of {PATCH}, got {size}")


def _check_frames(frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")

"""Opening a file: which formats are allowed, which of its streams is the video, and what it says of itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vft.deferred import av

from .frames import VideoError
from .timing import choose_rate

# text that FFmpeg draws as a video, and lists of other files, which may lie on the network
_REFUSED = {"tty", "hls", "dash", "concat", "sdp", "image2", "rtsp", "rtp"}
# a damaged header may claim any size; 8K is half of this
MAX_PIXELS = 1 << 26


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video stream. ``frames`` and ``seconds`` are 0 where the file does not say.

    ``height`` and ``width`` are as stored (neither turned nor made square), ``fps`` is the rate of
    :func:`vft.video.open_video`, ``audio`` the codec of the audio track that ``--audio copy`` takes, or "".
    """

    container: str
    codec: str
    height: int
    width: int
    frames: int
    fps: float
    seconds: float
    audio: str


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Facts of a file's video stream, without decoding it.

    Raises:
        VideoError: the file is missing or is not a video.
    """
    with opened(path) as (container, stream):
        codec, audio = stream.codec_context, audio_stream(container)
        rate, _ = choose_rate(stream, packets_of(container, stream, lambda error: None))
        return VideoInfo(
            container.format.name, codec.name, codec.height, codec.width, stream.frames, float(rate),
            stated_seconds(container, stream), audio.codec_context.name if audio else "",
        )  # fmt: skip


def _options() -> dict[str, str]:
    formats = av.formats_available - _REFUSED
    return {"protocol_whitelist": "file", "format_whitelist": ",".join(sorted(formats))}


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[tuple]:
    """(container, stream): a file and its video stream; FFmpeg's errors become VideoError, inside the block too."""
    with opened_container(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise VideoError(f"{os.fspath(path)}: no video stream in it")
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


@contextmanager
def opened_container(path: str | os.PathLike) -> Iterator:
    """A file that FFmpeg can read."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise VideoError(f"{name}: {'not a file' if os.path.exists(name) else 'no such file'}")
    if os.path.getsize(name) == 0:
        raise VideoError(f"{name}: the file is empty")
    try:
        # "file:" because a colon in the name would otherwise end a protocol
        with av.open(f"file:{name}", options=_options(), metadata_errors="ignore") as container:
            yield container
    except av.error.FFmpegError as error:
        raise VideoError(f"{name}: not a video, or a damaged one ({error.strerror})") from error


def packets_of(container, stream, failed: Callable[[av.error.FFmpegError], None]) -> Iterator:
    """The packets of a stream; where the file cannot be read on, ``failed`` gets the reason."""
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:
            # PyAV does not know a stream that begins in the middle of a file: its packet is passed over
            continue
        except av.error.FFmpegError as error:
            failed(error)
            return


def video_stream(container):
    """The stream flagged as default, among several the largest; a picture attached to music is none."""
    flags = av.stream.Disposition
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & flags.attached_pic]
    size = lambda s: (bool(s.disposition & flags.default), s.codec_context.width * s.codec_context.height)  # noqa: E731
    return max(streams, key=size, default=None)


def audio_stream(container):
    """The audio track flagged as default, else the first one; None where there is none."""
    streams = [s for s in container.streams.audio if s.codec_context]
    return max(streams, key=lambda s: bool(s.disposition & av.stream.Disposition.default), default=None)


def stated_seconds(container, stream) -> float:
    """Length of the video as the file states it, 0 where it does not."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return max(0.0, (container.duration or 0) / av.time_base)


def is_cut(name: str, container_format: str) -> bool:
    """Whether a file ends before it says: an MP4 or MOV box, an AVI chunk or a Matroska segment that is not whole."""
    end = os.path.getsize(name)
    with open(name, "rb") as file:
        if "mp4" in container_format:
            return _box_is_cut(file, end)
        head = file.read(64)
    if container_format == "avi":
        return head[:4] == b"RIFF" and 8 + int.from_bytes(head[4:8], "little") > end
    if "matroska" in container_format:
        return _segment_end(head) > end
    return False


def _box_is_cut(file, end: int) -> bool:
    position = 0
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


def _segment_end(head: bytes) -> int:
    """Where the Matroska segment after the EBML header ends; 0 where it does not say."""
    length, position = _ebml_size(head, 4)
    position += length
    if head[position : position + 4] != b"\x18\x53\x80\x67":
        return 0
    length, position = _ebml_size(head, position + 4)
    return position + length if length else 0


def _ebml_size(data: bytes, position: int) -> tuple[int, int]:
    """(size, position behind it) of an EBML length, whose first set bit says how many bytes it has; 0 if unknown."""
    width = 9 - data[position].bit_length() if position < len(data) else 9
    value = int.from_bytes(data[position : position + width], "big") & ((1 << 7 * width) - 1)
    unknown = width > 8 or value == (1 << 7 * width) - 1
    return (0 if unknown else value), position + width

"""The audio track of a video, copied as it is: into a Matroska file beside the tokens, and from there into a video."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from vft.deferred import av
from vft.files import replacing

from .container import audio_stream, opened_container, packets_of, video_stream
from .frames import VideoError

SUFFIX = ".mka"
# seconds before the first frame that are kept: decoders need a packet or two to begin
_LEAD = 0.1


def sidecar(tokens: str | os.PathLike) -> Path:
    """Where the audio of a token file lies: ``a.vft`` has ``a.vft.mka``."""
    return Path(f"{os.fspath(tokens)}{SUFFIX}")


def save_audio(source: str | os.PathLike, tokens: str | os.PathLike) -> Path | None:
    """Copy the audio track of a video beside its token file; None, and an old sidecar removed, where there is none.

    Time 0 of the copy is the video's first frame.

    Raises:
        VideoError: the source cannot be read.
        OSError: the sidecar cannot be written.
    """
    target = sidecar(tokens)
    with opened_container(source) as container:
        track = Track.of(container, source)
        if track is None:
            target.unlink(missing_ok=True)
            return None
        try:
            with replacing(target) as temporary, av.open(f"file:{temporary}", "w", format="matroska") as output:
                track.copier(output)(None)
        except av.error.FFmpegError as error:
            raise OSError(f"{target}: cannot be written ({error.strerror})") from error
    return target


def _raise(error: Exception) -> None:
    raise error


class Track:
    """An audio stream, whose times count from ``origin`` seconds."""

    def __init__(self, container, stream, origin: float) -> None:
        self.container, self.stream, self.origin = container, stream, origin

    @classmethod
    def of(cls, container, path: str | os.PathLike) -> Track | None:
        stream, video = audio_stream(container), video_stream(container)
        origin = 0.0 if video is None or video.start_time is None else float(video.start_time * video.time_base)
        return None if stream is None else cls(container, stream, origin)

    @classmethod
    @contextmanager
    def opened(cls, path: str | os.PathLike) -> Iterator[Track]:
        """
        Raises:
            VideoError: the file cannot be read, or has no audio track.
        """
        with opened_container(path) as container:
            track = cls.of(container, path)
            if track is None:
                raise VideoError(f"{os.fspath(path)}: no audio track in it")
            yield track

    def copier(self, output) -> Callable[[float | None], None]:
        """Adds the track to a container; the function copies what lies before a time in seconds (None: all)."""
        target = output.add_stream_from_template(self.stream)
        packets, held = packets_of(self.container, self.stream, _raise), []
        shift, lead = (round(seconds / self.stream.time_base) for seconds in (self.origin, _LEAD))

        def copy(until: float | None) -> None:
            while True:
                packet = held.pop() if held else next(packets, None)
                # an empty packet is the end
                if packet is None or packet.size == 0:
                    return
                time = packet.dts if packet.dts is not None else packet.pts
                if until is not None and time is not None and (time - shift) * self.stream.time_base > Fraction(until):
                    held.append(packet)
                    return
                if packet.pts is not None and packet.pts < shift - lead:
                    continue
                packet.pts = packet.pts if packet.pts is None else packet.pts - shift
                packet.dts = packet.dts if packet.dts is None else packet.dts - shift
                packet.stream = target
                output.mux(packet)

        return copy

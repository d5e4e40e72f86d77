"""Video files of every kind, written by PyAV and Pillow: what the tests of reading begin with."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

REPORTS = Path(__file__).parents[1] / "data" / "video"

# name: (codec, pixel format, container where the suffix does not say it)
KINDS = {
    "a.mp4": ("libx264", "yuv420p", None),
    "a.mov": ("libx264", "yuv444p", None),
    "a.mkv": ("libx264", "yuv420p", None),
    "a.webm": ("libvpx-vp9", "yuv420p", None),
    "a.avi": ("mpeg4", "yuv420p", None),
    "a.ts": ("libx264", "yuv420p", None),
    "a.mts": ("libx264", "yuv420p", "mpegts"),
    "a.flv": ("libx264", "yuv420p", None),
    "a.f4v": ("libx264", "yuv420p", "mp4"),
    "a.mpg": ("mpeg2video", "yuv420p", "mpeg"),
    "a.vob": ("mpeg2video", "yuv420p", None),
    "a.mxf": ("mpeg2video", "yuv420p", None),
    "a.asf": ("mpeg4", "yuv420p", None),
    "a.divx": ("mpeg4", "yuv420p", "avi"),
    "a.h264": ("libx264", "yuv420p", "h264"),
    "a.hevc": ("libx265", "yuv420p", "hevc"),
    "a.mjpeg": ("mjpeg", "yuvj420p", "mjpeg"),
    "a.y4m": ("wrapped_avframe", "yuv420p", "yuv4mpegpipe"),
    "a.gif": ("gif", "rgb8", "gif"),
}
# what an encoder writes to stderr otherwise
_QUIET = {"libx265": {"x265-params": "log-level=none"}}


def ramp(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames of one gray each, 20 more from frame to frame: uint8 [T, H, W, 3]."""
    gray = 10 + 20 * np.arange(frames)
    return np.broadcast_to(gray[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture without a symmetry: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // width, 255 * y // height, 40 + 60 * x // width + 120 * y // height], -1).astype(
        np.uint8
    )


def encode(
    path, images, codec="libx264", pix_fmt="yuv420p", *, container=None, rate=25, times=None, time_base=None,
    options=None, setup=lambda stream: None, convert=lambda frame: frame, container_options=None,
) -> Path:  # fmt: skip
    """Write uint8 ``[H, W, 3]`` images; ``times`` are timestamps in ``time_base``, ``setup`` gets the new stream,
    ``convert`` each frame in the encoder's pixel format."""
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={**_QUIET.get(codec, {}), **(options or {})})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if time_base is not None:
            stream.codec_context.time_base = stream.time_base = time_base
        setup(stream)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[index], time_base or 1 / Fraction(rate)
            output.mux(stream.encode(convert(frame)))
        output.mux(stream.encode())
    return Path(path)


def write_kind(folder: Path, name: str, frames: int = 10) -> Path:
    codec, pix_fmt, container = KINDS[name]
    return encode(folder / name, ramp(frames), codec, pix_fmt, container=container)


def animated(path, images, milliseconds) -> Path:
    """A GIF, APNG or WebP whose pictures have their own delays."""
    pictures = [Image.fromarray(image) for image in images]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(
        path, {".gif": "GIF", ".apng": "PNG", ".webp": "WEBP"}[path.suffix], save_all=True,
        append_images=pictures[1:], duration=milliseconds, loop=0, **options,
    )  # fmt: skip
    return path


def copied(source, target, *, times=None, keep=lambda index: True) -> Path:
    """The packets of a video in another file: those that ``keep`` takes, with ``times(index, pts)`` as timestamps."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if keep(index):
                if times is not None:
                    packet.pts = packet.dts = times(index, packet.pts)
                packet.stream = stream
                new.mux(packet)
    return Path(target)


def with_sound(path: Path) -> Path:
    """A video of 10 frames with 0.4 s of AAC: silence."""
    with av.open(str(path), "w") as output:
        video, audio = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=48000, layout="mono")
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for image in ramp(10):
            output.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        for start in range(0, 19200, 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 48000, start
            output.mux(audio.encode(sound))
        output.mux(video.encode())
        output.mux(audio.encode())
    return path

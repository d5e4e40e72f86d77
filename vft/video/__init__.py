"""Video files in and out, and the step between 8-bit frames and what a model takes; see docs/video.md.

PyAV is imported once a file is read or written.
"""

from importlib import import_module

from .frames import (
    PATCH,
    Video,
    VideoError,
    VideoStream,
    VideoWarning,
    cut_chunks,
    fit,
    preprocess,
    psnr,
    resize,
    to_uint8,
)

OUTPUT_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}

_LAZY = {
    "VideoInfo": "container",
    "probe_video": "container",
    "open_video": "read",
    "read_video": "read",
    "contact_sheet": "sheet",
    "output_format": "write",
    "output_rate": "write",
    "write_video": "write",
}

__all__ = [
    "OUTPUT_FORMATS",
    "PATCH",
    "Video",
    "VideoError",
    "VideoStream",
    "VideoWarning",
    "cut_chunks",
    "fit",
    "preprocess",
    "psnr",
    "resize",
    "to_uint8",
    *sorted(_LAZY),
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)

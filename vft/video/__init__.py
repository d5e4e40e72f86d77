"""Video files in and out, and the step between 8-bit frames and what a model takes; see docs/video.md."""

from .container import VideoInfo, probe_video
from .frames import (
    PATCH,
    Video,
    VideoError,
    VideoStream,
    VideoWarning,
    cut_chunks,
    fit,
    preprocess,
    resize,
    to_uint8,
)
from .read import open_video, read_video
from .sheet import contact_sheet
from .write import OUTPUT_FORMATS, output_format, output_rate, write_video

__all__ = [
    "OUTPUT_FORMATS",
    "PATCH",
    "Video",
    "VideoError",
    "VideoInfo",
    "VideoStream",
    "VideoWarning",
    "contact_sheet",
    "cut_chunks",
    "fit",
    "open_video",
    "output_format",
    "output_rate",
    "preprocess",
    "probe_video",
    "read_video",
    "resize",
    "to_uint8",
    "write_video",
]

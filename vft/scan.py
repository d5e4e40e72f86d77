"""Which files of a folder are videos: those that FFmpeg can read, whatever they are called."""

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vft.video import VideoError, open_video
from vft.video.audio import SUFFIX as AUDIO
from vft.video.container import opened

# files that say that they are videos: what is wrong with one is an error of the run; others are looked into
_CLAIMS = (
    ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
_UNFINISHED = (".aria2", ".crdownload", ".download", ".opdownload", ".part", ".partial", ".temp", ".tmp", ".ytdl", "~")
# what a run itself writes
_OURS = (".vft", f".vft{AUDIO}", ".jsonl")


@dataclass(frozen=True)
class Found:
    """Videos, sorted paths relative to the folder with ``/``; ``left_out``: other files, and why they are none."""

    videos: list[str]
    left_out: dict[str, str]


def scan(folder: str | os.PathLike) -> Found:
    """The videos below a folder; hidden files and folders, token files and manifests are passed over.

    Raises:
        OSError: ``folder`` is not a folder, or one in it cannot be read.
        ValueError: there is no video.
    """
    if not os.path.isdir(folder):
        raise OSError(f"{os.fspath(folder)}: {'not a folder' if os.path.exists(folder) else 'no such folder'}")

    def refuse(error: OSError):
        raise error

    videos, left_out = [], {}
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or name.lower().endswith(_OURS):
                continue
            reason = _not_a_video(path)
            file = path.relative_to(folder).as_posix()
            if reason is None:
                videos.append(file)
            else:
                left_out[file] = reason
    if not videos:
        raise ValueError(f"{os.fspath(folder)}: no videos in it ({len(left_out)} other files)")
    return Found(sorted(videos), dict(sorted(left_out.items())))


def find_videos(folder: str | os.PathLike) -> list[str]:
    """The videos of :func:`scan`."""
    return scan(folder).videos


def _not_a_video(path: Path) -> str | None:
    """Why a file is left out; None for a video."""
    name = path.name.lower()
    if name.endswith(_UNFINISHED):
        return "an unfinished download"
    if name.endswith(_CLAIMS):
        return None
    try:
        with opened(path) as (container, _):
            picture = container.format.name.endswith("_pipe") or container.format.name == "apng"
        with open_video(path, warn=False) as video:
            frames = len(list(islice(video.frames, 2)))
    except VideoError as error:
        return str(error).removeprefix(f"{path}: ")
    return "a still picture" if picture and frames == 1 else None

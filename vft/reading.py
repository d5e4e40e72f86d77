"""What commands say of the videos that they read: options, help, and what was lost or left out."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

# files left out that are named one by one
_NAMED = 20
FRAMES = """\
What happens to the frames of a video:
  rate    sampled on a uniform grid by their timestamps, at the file's own rate or --fps; fields are joined
  pixels  upright, square, 8 bits; the centred square, resized to what the model works at; the rest is cut away
  colour  as tagged, else BT.709 from 720 lines on and BT.601 below; HDR mapped to SDR; transparent parts over black
  audio   left out, unless --audio copy keeps the track in a file beside the tokens
"""


def add_reading(command: argparse.ArgumentParser) -> None:
    """How ``vft encode`` reads videos, and four lines in its help on what happens to their frames."""
    command.add_argument("--fps", type=float, help="frames a second that are taken (default: the video's own rate)")
    command.add_argument("--strict", action="store_true", help="refuse damaged videos, whose good frames are used else")
    command.add_argument("--checksum", action="store_true", help="with --batch: tell by content what has changed")
    add_audio(command, "keep the audio track beside the tokens (FILE.vft.mka)")
    command.epilog = FRAMES
    command.formatter_class = argparse.RawDescriptionHelpFormatter


def add_audio(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--audio", choices=("copy", "drop"), default="drop", help=f"copy: {what} (default: drop)")


def print_left_out(files: dict[str, str]) -> None:
    """Names files of a folder that are no videos, and why."""
    for file, reason in islice(files.items(), _NAMED):
        print(f"vft: left out: {file}: {reason}", file=sys.stderr)
    if len(files) > _NAMED:
        print(f"vft: left out: {len(files) - _NAMED} more", file=sys.stderr)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Prints each :class:`vft.video.VideoWarning` and :class:`vft.fingerprint.TokensWarning` as one line on stderr."""
    from vft.fingerprint import TokensWarning
    from vft.video import VideoWarning

    ours = VideoWarning, TokensWarning

    with warnings.catch_warnings():
        for kind in ours:
            warnings.simplefilter("always", kind)
        other = warnings.showwarning

        def show(message, category, *where, **more) -> None:
            if issubclass(category, ours):
                print(f"vft: warning: {' '.join(str(message).split())}", file=sys.stderr)
            else:
                other(message, category, *where, **more)

        warnings.showwarning = show
        yield

"""Reads mutated video files: ``python video_fuzz.py FOLDER FIRST LAST`` prints one line for each that goes wrong.

File i is a seed file with damage drawn from seed i: cut, bits flipped, a block zeroed, repeated or left out, or the
beginning of one file before the rest of another. A file that takes over 20 s ends the process with a traceback.
"""

import faulthandler
import sys
import traceback
import warnings
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

from vft.scan import scan
from vft.video import VideoError, VideoWarning, open_video, probe_video
from vft.video.audio import save_audio

LIMIT = 20


def mutated(seed: int, files: list[bytes]) -> bytes:
    draw = np.random.default_rng(seed)
    data = bytearray(files[draw.integers(len(files))])
    for _ in range(draw.integers(1, 4)):
        kind, at = draw.integers(6), int(draw.integers(len(data)))
        # headers are where a bit matters most
        at = at if draw.random() < 0.5 else at % min(len(data), 1024)
        length = int(draw.integers(1, 400))
        if kind == 0:
            del data[max(1, at) :]
        elif kind == 1:
            for place in draw.integers(at, min(at + 2000, len(data)), 1 + length // 20):
                data[place] ^= 1 << draw.integers(8)
        elif kind == 2:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4 and len(data) > length + 1:
            del data[at : at + length]
        else:
            other = files[draw.integers(len(files))]
            data[:at] = other[:at]
    return bytes(data)


def read(path: Path) -> None:
    with suppress(VideoError):
        probe_video(path)
    for start in (0.0, 0.3):
        with suppress(VideoError), open_video(path, 64, start) as video:
            for frame in islice(video.frames, 60):
                assert frame.shape == (64, 64, 3)
    try:
        save_audio(path, path)
        scan(path.parent)
    except (VideoError, OSError):
        pass
    except ValueError as error:
        assert "no videos in it" in str(error)


def main(folder: Path, first: int, last: int) -> None:
    warnings.simplefilter("ignore", VideoWarning)
    files = [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
    work = folder / "mutated"
    work.mkdir(exist_ok=True)
    for seed in range(first, last):
        # no suffix: the contents say what it is
        path = work / f"{seed}"
        path.write_bytes(mutated(seed, files))
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        print(f"seed {seed}", file=sys.stderr, flush=True)
        try:
            read(path)
        except Exception:
            print(f"seed {seed}: {traceback.format_exc()}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        for left in work.iterdir():
            left.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

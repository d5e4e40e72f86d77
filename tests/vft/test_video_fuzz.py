"""Damaged files end in frames or one error: no crash, no hang, no other exception."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import video_files
import video_fuzz


def seed_files(folder: Path) -> None:
    for name in video_files.KINDS:
        video_files.write_kind(folder, name)
    for suffix in ("gif", "apng", "webp"):
        video_files.animated(folder / f"own.{suffix}", video_files.ramp(4), [300, 100, 100, 200])
    for name in ("hflip.mp4", "vfr.mp4", "live.webm", "interlaced.mpg", "hdr_real.mp4", "one_bad_packet.mp4"):
        (folder / name).write_bytes((video_files.REPORTS / name).read_bytes())
    video_files.with_sound(folder / "sound.mp4")


@pytest.mark.parametrize(("first", "last"), [(0, 200), pytest.param(200, 2000, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, first, last):
    seed_files(tmp_path)
    support = str(Path(video_fuzz.__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([support, *sys.path])}
    command = [sys.executable, video_fuzz.__file__, str(tmp_path), str(first), str(last)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == ""

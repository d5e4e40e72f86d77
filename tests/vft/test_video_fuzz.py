"""Damaged files end in frames or one error: no crash, no hang, no other exception."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
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
    with_sound(folder / "sound.mp4")


def with_sound(path: Path) -> None:
    with av.open(str(path), "w") as output:
        video, audio = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=48000, layout="mono")
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for image in video_files.ramp(10):
            output.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        for start in range(0, 19200, 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 48000, start
            output.mux(audio.encode(sound))
        output.mux(video.encode())
        output.mux(audio.encode())


@pytest.mark.parametrize(("first", "last"), [(0, 200), pytest.param(200, 2000, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, first, last):
    seed_files(tmp_path)
    support = str(Path(video_fuzz.__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([support, *sys.path])}
    command = [sys.executable, video_fuzz.__file__, str(tmp_path), str(first), str(last)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == ""

"""Folders of one writer: a second run is refused, parts of one run are not, and a killed run holds nothing."""

import subprocess
import sys

import pytest
from train_worker import SETTINGS, SMALL

from vft import Tokenizer, batch
from vft.config import make_config, parse_config
from vft.data import Encoder, encode
from vft.files import only_writer, replacing
from vft.train.tokenizer import train

REFUSED = "is being written by another run"
HOLDER = """
import sys, time
from pathlib import Path
from vft.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with only_writer(tmp_path):
        for rank, world_size in ((0, 1), (0, 2), (1, 2)):
            with pytest.raises(OSError, match=REFUSED), only_writer(tmp_path, rank, world_size):
                pass
    with only_writer(tmp_path):
        pass


def test_parts_of_one_run_share_a_folder(tmp_path):
    with only_writer(tmp_path, 0, 2), only_writer(tmp_path, 1, 2):
        for rank, world_size in ((0, 1), (0, 2), (1, 2), (1, 4)):
            with pytest.raises(OSError, match=REFUSED), only_writer(tmp_path, rank, world_size):
                pass
        with only_writer(tmp_path, 2, 3):
            pass


def test_a_killed_run_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=REFUSED), only_writer(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with only_writer(tmp_path):
        pass


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    left = [tmp_path / ".0123456789ab.tmp", tmp_path / "a" / ".ba9876543210.tmp"]
    kept = [tmp_path / ".mine.tmp", tmp_path / "a" / "0123456789ab.tmp", tmp_path / "a" / ".0123456789ab.tmp.vft"]
    (tmp_path / "a").mkdir()
    for path in (*left, *kept):
        path.touch()
    # others of the same run may be writing
    with only_writer(tmp_path, 0, 2), only_writer(tmp_path, 1, 2):
        assert all(path.exists() for path in left)
    with only_writer(tmp_path):
        assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
        with replacing(tmp_path / "new") as temporary:
            temporary.touch()
            with pytest.raises(OSError, match=REFUSED), only_writer(tmp_path):
                pass
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["film.mp4", "sub/a.vft"])
def test_what_somebody_is_writing_stays(name, tmp_path):
    """A video that is decoded into the folder, and a run of its own in a folder below."""
    (tmp_path / "sub").mkdir()
    left, folder = tmp_path / "sub" / "other", tmp_path / ".0123456789ab.tmp"
    left.mkdir()
    folder.mkdir()
    (left / ".0123456789ab.tmp").touch()
    with replacing(tmp_path / name) as temporary:
        temporary.touch()
        with only_writer(tmp_path):
            assert temporary.exists() and folder.exists() and not (left / ".0123456789ab.tmp").exists()
    assert (tmp_path / name).exists()


def test_encoding_and_training_are_refused_and_change_nothing(tmp_path):
    videos, output = tmp_path / "videos", tmp_path / "output"
    videos.mkdir()
    output.mkdir()
    (videos / "a.mp4").write_bytes(b"no video")
    model = Tokenizer(
        parse_config(make_config(codec="linear", encoder_width=32, decoder_width=32, head_dim=32, registers=4, size=16))
    )
    with only_writer(output):
        with pytest.raises(OSError, match=REFUSED):
            batch.encode_folder(model, videos, output)
        with pytest.raises(OSError, match=REFUSED):
            encode.encode_shards(videos, output, Encoder(model))
        with pytest.raises(OSError, match=REFUSED):
            train(output, SETTINGS, config=SMALL)
    assert {path.name for path in output.iterdir()} == {".lock", ".lock.0"}

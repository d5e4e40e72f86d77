"""bench/engines.py counts what it says: clips lost, there twice and of wrong checksums; and kills what it starts."""

import json
import sys

import engines
import pytest
import torch

from vft import VideoTokens
from vft.data import write_shard
from vft.data.rows import row_of

NAMES = [f"{i}.mp4" for i in range(6)]


def tokens(i):
    return VideoTokens(torch.full((2, 4), i), 8.0, 5, 16, 16, "m", (16, 16), fingerprint="f" * 16)


@pytest.fixture
def files(tmp_path):
    """As `--batch` leaves them."""
    folder, lines = tmp_path / "files", []
    folder.mkdir()
    for i, name in enumerate(NAMES):
        tokens(i).save(folder / f"{name}.vft")
        checksum = row_of(tokens(i), name)["checksum"]
        lines.append(json.dumps({"file": name, "model": "m", "registers": 4, "checksum": checksum}))
    (folder / "manifest.0.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(2):
        write_shard(folder / f"{s}.tar", [row_of(tokens(i), NAMES[i]) for i in range(3 * s, 3 * s + 3)])
    return folder


def test_files_are_counted(files):
    manifest = files / "manifest.0.jsonl"
    lines = manifest.read_text().splitlines()
    assert engines.check_files(files, NAMES) == (0, 0, 0) and engines.files_done(files) == 6
    manifest.write_text("\n".join([*lines[1:], lines[3], '{"file": "0.mp4", "error": "gone"}']) + "\n")
    tokens(9).save(files / "4.mp4.vft")
    assert engines.check_files(files, NAMES) == (1, 1, 1)


def test_shards_are_counted(shards):
    assert engines.check_shards(shards, NAMES) == (0, 0, 0) and engines.shards_done(shards) == 6
    damaged = row_of(tokens(4), NAMES[4]) | {"checksum": "0" * 64}
    engines.rows_of_index.cache_clear()
    write_shard(shards / "1.tar", [row_of(tokens(2), NAMES[2]), row_of(tokens(3), NAMES[3]), damaged])
    assert engines.check_shards(shards, NAMES) == (1, 1, 1)


def test_the_least_share_of_equal_ids(files, shards):
    assert engines.equal_ids(files, shards) == 1
    ids = tokens(3).ids.clone()
    ids[0, 0] = 7
    VideoTokens(ids, 8.0, 5, 16, 16, "m", (16, 16), fingerprint="f" * 16).save(files / "3.mp4.vft")
    assert engines.equal_ids(files, shards) == 7 / 8


def test_a_run_is_killed_at_its_point_or_said_to_have_ended():
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    counts = iter([0, 0, 1, 3, 4, 4])
    seconds, done, going = engines.run(sleep, lambda: next(counts), 2, 0)
    assert seconds < 50 and done == 4 and 0 < going < 3 / engines.POLL
    with pytest.raises(RuntimeError, match="exit code 0 before the run was killed"):
        engines.run([sys.executable, "-c", ""], lambda: 0, 2, 0)
    with pytest.raises(RuntimeError, match="exit code 3"):
        engines.run([sys.executable, "-c", "raise SystemExit(3)"], lambda: 0, None, 0)


def test_what_is_wrong_is_not_right():
    good = engines.Row("ray", 10, [1.0, 2.0, 3.0], [3, 5], 1.67, 2.04, 0, 0, 0, 0)
    assert good.right and "| ray | 10 | 1.0 + 2.0 + 3.0 | 3, 5 | 1.7 | 2.0 | 0 | 0 | 0 | 0 |" in engines.table([good])
    for name in ("lost", "twice", "wrong_checksums", "left_behind"):
        assert not engines.Row(**{**vars(good), name: 1}).right

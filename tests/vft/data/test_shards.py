"""Shards: what is written is read back, in part, by others, and not at all where it is not whole."""

import errno
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vft import VideoTokens
from vft.data import TokenDataset, open_shard, parquet, tar, write_shard
from vft.data.index import SUFFIX
from vft.data.rows import error_row, row_of
from vft.data.shards import find_shards

LEVELS, REGISTERS = (8, 8, 8, 5, 5, 5), 32


def rows_of(count, registers=REGISTERS, seed=0, latent_frames=None):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        t = latent_frames or 1 + i % 5
        ids = torch.from_numpy(rng.integers(64000, size=(t, registers)))
        tokens = VideoTokens(ids, 25.0, 4 * t - 3, 48, 64, "tiny", LEVELS, fingerprint="f" * 16)
        made.append(row_of(tokens, f"class{i % 3}/{i:06d}.mp4") | {"label": i % 3})
    return made


@pytest.fixture(params=["tar", "parquet"])
def kind(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


@pytest.mark.parametrize("indexed", [True, False])
def test_written_is_read(tmp_path, kind, indexed, monkeypatch):
    monkeypatch.setattr(tar, "BLOCK", 16)
    monkeypatch.setattr(parquet, "GROUP", 16)
    rows = rows_of(40)
    path = tmp_path / f"a.{kind}"
    write_shard(path, rows)
    if not indexed:
        (tmp_path / f"a.{kind}{SUFFIX}").unlink()
    shard = open_shard(path)
    read = [row for block in range(len(shard.blocks)) for row in shard.read(block, None)]
    assert len(read) == len(rows) == sum(shard.blocks) and len(shard.blocks) == 3
    for a, b in zip(read, rows, strict=True):
        assert a["ids"].dtype == np.uint16 and np.array_equal(a["ids"], b["ids"])
        names = (
            "key",
            "frames",
            "fps",
            "height",
            "width",
            "checksum",
            "label",
            "model",
            "fingerprint",
            "error",
            "chunk",
        )
        assert [a[name] for name in names] == [b[name] for name in names]
        assert list(a["levels"]) == list(LEVELS)
    assert shard.keys() == [row["key"] for row in rows] and shard.latent_frames() == [len(r["ids"]) for r in rows]
    assert TokenDataset(path).damaged() == {}
    for keep in (1, 3, 4, 32):
        got = [row["ids"] for row in shard.read(0, keep)]
        assert all(np.array_equal(a, b["ids"][:, :keep]) for a, b in zip(got, rows, strict=False))


def test_byte_ranges_of_the_index_are_those_of_the_rows(tmp_path):
    rows = rows_of(5)
    index = write_shard(tmp_path / "a.tar", rows)
    data = (tmp_path / "a.tar").read_bytes()
    for (offset, size, start, length), row in zip(index.ranges, rows, strict=True):
        assert torch.equal(VideoTokens.from_bytes(data[offset : offset + size]).ids, torch.tensor(row["ids"].tolist()))
        assert json.loads(data[start : start + length])["key"] == row["key"]


class Counting(io.FileIO):
    """A file that counts the bytes read from it."""

    def __init__(self, path):
        super().__init__(path)
        self.bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes += len(data)
        return data


def test_the_first_registers_are_a_small_part_of_a_parquet_shard(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    rng, row = np.random.default_rng(0), rows_of(1)[0]
    ids = rng.integers(64000, size=(10_000, 5, REGISTERS), dtype=np.uint16)
    rows = [row | {"key": f"{i:06d}.mp4", "ids": ids[i], "checksum": rng.bytes(32).hex()} for i in range(10_000)]
    index = write_shard(path, rows)
    shard = open_shard(path)
    total = 0
    for block in range(len(shard.blocks)):
        file = Counting(path)
        assert shard.read(block, 4, file)[0]["ids"].shape == (5, 4)
        total += file.bytes
    assert 4 / 32 * 0.8 < total / index.bytes < 4 / 32 + 0.02
    columns = {name: sum(size for _, size in ranges) for name, ranges in index.columns.items()}
    assert columns["ids_16_32"] > 7 * columns["ids_2_4"] and set(columns) >= {"ids_0_1", "ids_1_2", "key"}
    assert sum(columns.values()) < index.bytes < 1.05 * sum(columns.values())


def bytes_read() -> int:
    """By this process's system calls, all its threads."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by Linux")
def test_a_small_shard_is_read_no_further_either(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    index = write_shard(path, rows_of(1000, latent_frames=5))
    # the index is read too, and counted apart
    beside = path.with_name(path.name + SUFFIX).stat().st_size
    taken = {}
    # modules are loaded by the first
    for keep in (1, 4, 32):
        before = bytes_read()
        rows = TokenDataset(path, keep=keep)
        assert sum(row["ids"].shape[1] for row in rows.stream(shuffle=False)) == 1000 * keep
        taken[keep] = (bytes_read() - before - beside) / index.bytes
    assert taken[4] < 4 / 32 + 0.02 and 0.99 < taken[32] < 1.02


def test_webdataset_reads_a_tar(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    rows = rows_of(3)
    write_shard(tmp_path / "a.tar", rows)
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["key"] for sample in read] == [row["key"] for row in rows]
    assert np.array_equal(VideoTokens.from_bytes(read[2]["vft"]).ids.numpy(), rows[2]["ids"])


def write_tar_of(folder, described):
    """a.tar with one row, by no function of ours."""
    (folder / "x.vft").write_bytes(VideoTokens(torch.tensor([[1, 2]]), 8, 1, 8, 8, "m", (8, 8)).to_bytes())
    (folder / "x.json").write_text(described)
    with tarfile.open(folder / "a.tar", "w") as file:
        for name in ("x.vft", "x.json"):
            file.add(folder / name, name)


def test_a_tar_of_somebody_else(tmp_path):
    write_tar_of(tmp_path, '{"caption": "a cat"}')
    (row,) = open_shard(tmp_path / "a.tar").read(0, None)
    assert (row["key"], row["caption"], row["ids"].tolist()) == ("x", "a cat", [[1, 2]])


@pytest.mark.parametrize("described", ['{"checksum": "0"}', '{"key": "y", "frames": 3}', "{}"])
def test_a_tar_whose_json_describes_a_row_in_part(tmp_path, described):
    write_tar_of(tmp_path, described)
    (row,) = open_shard(tmp_path / "a.tar").read(0, None)
    assert (row["key"], row["height"], row["ids"].tolist()) == ("y" if "y" in described else "x", 8, [[1, 2]])


@pytest.mark.parametrize("described", ["[1, 2]", "5", "null", "{"])
def test_a_tar_whose_json_describes_no_row(tmp_path, described):
    write_tar_of(tmp_path, described)
    with pytest.raises(ValueError, match=r"a\.tar: x: its \.json must be a mapping of columns"):
        open_shard(tmp_path / "a.tar")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_cut_off_is_refused_by_name(tmp_path, kind, indexed):
    path = tmp_path / f"a.{kind}"
    write_shard(path, rows_of(20))
    if not indexed:
        (tmp_path / f"a.{kind}{SUFFIX}").unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=rf"a\.{kind}: .*(must have \d+ bytes|cut off)"):
        open_shard(path)


def test_a_changed_byte_is_found(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    index = write_shard(path, rows_of(3, latent_frames=5))
    data = bytearray(path.read_bytes())
    if kind == "parquet":
        offset, size = index.columns["ids_16_32"][0]
        data[offset + size // 2] ^= 255
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.parquet: row group 0 is damaged .*checksum"):
            TokenDataset(path).damaged()
        return
    data[index.ranges[1][0] + index.ranges[1][1] - 2] ^= 1
    path.write_bytes(data)
    assert list(TokenDataset(path).damaged()) == ["class1/000001.mp4"]


def test_rows_of_different_models_and_bad_rows(tmp_path, kind):
    rows = rows_of(3)
    with pytest.raises(ValueError, match=r"rows of a shard must share model, .* of 'class1/000001\.mp4'"):
        write_shard(tmp_path / f"a.{kind}", [rows[0], rows[1] | {"fingerprint": "0" * 16}])
    assert not list(tmp_path.iterdir())
    index = write_shard(tmp_path / f"a.{kind}", [rows[0], error_row("bad", "no such file", 32), rows[2]])
    assert index.errors == [{"key": "bad", "error": "no such file"}] and index.key == [rows[0]["key"], rows[2]["key"]]
    write_shard(tmp_path / f"b.{kind}", [error_row("bad", "no such file", 32)])
    assert [p.name for p in find_shards(tmp_path)] == [f"a.{kind}"]


def test_a_full_disk_leaves_nothing(tmp_path, kind, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = rows_of(3)
    if kind == "tar":
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    else:
        import pyarrow.parquet

        monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / f"a.{kind}", rows)
    assert not list(tmp_path.iterdir())


def test_a_shard_without_an_index_is_unfinished_where_another_has_one(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", rows_of(2))
    (tmp_path / f"b.tar{SUFFIX}").unlink()
    assert [p.name for p in find_shards(tmp_path)] == ["a.tar"]
    (tmp_path / f"a.tar{SUFFIX}").unlink()
    assert [p.name for p in find_shards(tmp_path)] == ["a.tar", "b.tar"]
    (tmp_path / f"a.tar{SUFFIX}").write_text("{")
    with pytest.raises(ValueError, match=r"a\.tar\.index\.json: not an index of a shard"):
        open_shard(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "change", [{"facts": {}}, {"key": []}, {"checksum": ["0"]}, {"facts": None}, {"latent_frames": 3}, {"more": 1}]
)
def test_an_index_that_is_not_whole(tmp_path, change):
    write_shard(tmp_path / "a.tar", rows_of(2))
    path = tmp_path / f"a.tar{SUFFIX}"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"a\.tar\.index\.json: not an index of a shard, or a damaged one \("):
        open_shard(tmp_path / "a.tar")


def test_a_damaged_footer_of_a_parquet_shard(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    write_shard(path, rows_of(20))
    whole = path.read_bytes()
    for data in (whole[:-600] + b"\xff" * 592 + whole[-8:], whole[:-8] + b"\xff" * 4 + b"PAR1", b"PAR1", b""):
        path.write_bytes(data)
        (tmp_path / f"a.parquet{SUFFIX}").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file, or one that is (cut off|damaged)"):
            open_shard(path)


def test_other_suffixes(tmp_path):
    for call in (lambda: write_shard(tmp_path / "a.zip", []), lambda: open_shard(tmp_path / "a.zip")):
        with pytest.raises(ValueError, match=r"must end in \.tar or \.parquet, got"):
            call()

"""TokenDataset and its stream: every row once an epoch on any number of processes, and on with the next row."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vft import VideoTokens
from vft.data import TokenDataset, write_shard
from vft.data import tar as tar_shards
from vft.data.rows import row_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tars of 40 rows in blocks of 8, whose key is the row's number."""
    root = tmp_path_factory.mktemp("shards")
    for s in range(3):
        rows = []
        for i in range(40 * s, 40 * s + 40):
            ids = torch.full((1 + i % 3, 8), i)
            rows.append(row_of(VideoTokens(ids, 8.0, 1, 16, 16, "m", (16, 16), fingerprint="f" * 16), str(i)))
        write_shard(root / f"{s}.tar", rows)
    return root


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tar_shards, "BLOCK", 8)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def numbers(rows):
    return [int(row["key"]) for row in rows]


def test_rows_by_number(folder):
    rows = TokenDataset(folder, keep=2)
    assert len(rows) == 120 and len(rows.blocks) == 15 and rows.keys() == [str(i) for i in range(120)]
    for i in (0, 7, 8, 39, 40, 119, -1):
        item = rows[i]
        assert item["ids"].dtype == torch.int64 and item["ids"].shape == (1 + i % 120 % 3, 2)
        assert (item["ids"] == i % 120).all() and "fingerprint" not in item and item["height"] == 16
    assert rows.latent_frames() == [1 + i % 3 for i in range(120)]
    with pytest.raises(IndexError):
        rows[120]
    assert len(pickle.dumps(rows)) < 30_000 and pickle.loads(pickle.dumps(rows))[5]["key"] == "5"


def test_a_folder_of_files(tmp_path):
    for i in range(70):
        VideoTokens(torch.full((1, 4), i), 8.0, 1, 16, 16, "m", (16, 16)).save(tmp_path / f"{i:02d}.mp4.vft")
    rows = TokenDataset(tmp_path, keep=3)
    assert rows[69]["key"] == "69.mp4" and rows[69]["ids"].tolist() == [[69] * 3] and len(rows.blocks) == 2


def test_an_epoch_has_every_row_once_and_another_order(folder):
    stream = TokenDataset(folder).stream(seed=1, window=4)
    first, second = numbers(stream), numbers(stream)
    assert sorted(first) == sorted(second) == list(range(120)) and first != second and stream.epoch == 2
    # rows of several blocks are mixed
    assert len({i // 8 for i in first[:8]}) > 1
    assert (
        first == numbers(TokenDataset(folder).stream(seed=1, window=4)) != numbers(TokenDataset(folder).stream(seed=2))
    )
    assert numbers(TokenDataset(folder).stream(shuffle=False)) == list(range(120))


@pytest.mark.parametrize("world_size", [2, 7])
def test_processes_share_an_epoch_evenly(folder, world_size):
    parts = [numbers(TokenDataset(folder).stream(rank=r, world_size=world_size)) for r in range(world_size)]
    assert {len(part) for part in parts} == {120 // world_size}
    taken = [i for part in parts for i in part]
    assert len(set(taken)) == len(taken) == 120 // world_size * world_size


def test_processes_of_torchrun(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    stream = TokenDataset(folder).stream()
    assert (stream.rank, stream.world_size, len(stream)) == (1, 3, 40)


def test_workers_share_what_their_process_has(folder):
    stream = TokenDataset(folder).stream(rank=1, world_size=2)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(numbers(loader)) == sorted(numbers(TokenDataset(folder).stream(rank=1, world_size=2)))


@pytest.mark.parametrize("taken", [1, 13, 60, 61, 120])
def test_goes_on_in_the_middle_of_a_shard(folder, taken):
    make = lambda: TokenDataset(folder).stream(seed=3, rank=0, world_size=2)  # noqa: E731
    whole, stream = make(), make()
    want = numbers(whole) + numbers(whole) + numbers(whole)
    got = []
    while len(got) < taken:
        for row in stream:
            got.append(int(row["key"]))
            if len(got) == taken:
                break
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    while len(got) < len(want):
        got += numbers(resumed)
    assert got == want


def test_a_state_of_something_else_is_refused(folder):
    state = TokenDataset(folder).stream(seed=3).state_dict()
    with pytest.raises(ValueError, match="seed must be 3 as in the state, got 4"):
        TokenDataset(folder).stream(seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="rows must be 120 as in the state, got 40"):
        TokenDataset(folder / "1.tar").stream(seed=3).load_state_dict(state)


def test_wrong_sources(folder, tmp_path):
    for options, message in (
        ({"model": "n"}, r"0\.tar: model must be 'n', got 'm'"),
        ({"fingerprint": "0" * 16}, r"0\.tar: fingerprint must be '0{16}', got 'f{16}'"),
        ({"keep": 9}, r"0\.tar: keep must be between 1 and 8, got 9"),
        ({"cached": 0}, "cached must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenDataset(folder, **options)
    with pytest.raises(ValueError, match=r"neither shards nor \.vft files"):
        TokenDataset(tmp_path)
    with pytest.raises(OSError, match="no such file or folder"):
        TokenDataset(tmp_path / "gone")
    with pytest.raises(ValueError, match="source must name at least one shard"):
        TokenDataset([])
    rows = TokenDataset(folder)
    for options, message in (
        ({"rank": 0}, "rank and world_size must be given together"),
        ({"rank": 2, "world_size": 2}, "rank must be between 0 and 1, got 2"),
        ({"window": 17}, "window must be between 1 and the 16 blocks cached, got 17"),
        ({"rank": 0, "world_size": 121}, "a row for each of 121 processes, got 120"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.stream(**options)


def test_shards_of_models_of_one_name_and_other_weights(folder, tmp_path):
    tokens = VideoTokens(torch.zeros(1, 8, dtype=torch.int64), 8.0, 1, 16, 16, "m", (16, 16), fingerprint="e" * 16)
    write_shard(tmp_path / "other.tar", [row_of(tokens, "a")])
    with pytest.raises(ValueError, match=r"other\.tar: fingerprint must be 'f{16}', got 'e{16}'"):
        TokenDataset([folder / "0.tar", tmp_path / "other.tar"])
    # one that states none may be anything
    write_shard(tmp_path / "other.tar", [row_of(replace(tokens, fingerprint=""), "a")])
    assert len(TokenDataset([tmp_path / "other.tar", folder / "0.tar"])) == 41


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(fingerprint="e" * 16), r"1\.vft: fingerprint must be 'f{16}', got 'e{16}'"),
        (dict(model="n"), r"1\.vft: model must be 'm', got 'n'"),
        (dict(levels=(16, 8)), r"1\.vft: levels must be \[16, 16\], got \[16, 8\]"),
        (dict(ids=torch.zeros(1, 2, dtype=torch.int64)), r"1\.vft: keep must be between 1 and 2, got 4"),
    ],
)
def test_a_folder_of_files_of_several_models(tmp_path, change, message):
    given = dict(ids=torch.zeros(1, 4, dtype=torch.int64), fps=8.0, frames=1, height=16, width=16, model="m")
    given |= dict(levels=(16, 16), fingerprint="f" * 16)
    VideoTokens(**given).save(tmp_path / "0.vft")
    VideoTokens(**given | change).save(tmp_path / "1.vft")
    rows = TokenDataset(tmp_path)
    with pytest.raises(ValueError, match=message):
        rows[1]


def test_the_index_of_blocks_is_that_of_the_rows(folder):
    rows = TokenDataset([folder / "2.tar", folder / "0.tar"])
    assert np.array_equal(rows.starts[:3], [0, 8, 16]) and rows[0]["key"] == "80" and rows[40]["key"] == "0"

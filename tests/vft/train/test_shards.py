"""`vft train generator --data` on shards: the losses of the same tokens as files, and of a run that was resumed."""

import json

import pytest
import torch

from vft import Tokenizer, VideoTokens, cli
from vft.config import make_config, parse_config
from vft.data import write_shard
from vft.data.rows import row_of

OPTIONS = [
    "--batch",
    "2",
    "--depth",
    "1",
    "-k",
    "2",
    "--learning-rate",
    "0.01",
    "--optimizer",
    "adamw",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    config = make_config(
        codec="linear", encoder_width=32, decoder_width=32, head_dim=32, registers=4, size=16, levels=(8, 8)
    )
    Tokenizer(parse_config(config), "small").save(path)
    return str(path)


def clips(model):
    generator, tokenizer = torch.Generator().manual_seed(0), Tokenizer.from_pretrained(model)
    facts = dict(model="small", levels=tokenizer.config.levels, fingerprint=tokenizer.fingerprint)
    for i in range(12):
        ids = torch.randint(64, (1 + i % 2, 4), generator=generator)
        yield (
            f"{'cat' if i % 3 else 'dog'}/{i:02d}",
            VideoTokens(ids, 8.0, 1, 32, 32, **facts),
        )


def train(output, data, model, *options):
    return cli.main(
        ["train", "generator", "-o", str(output), "--data", str(data), "--tokenizer", model, *OPTIONS, *options]
    )


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    for key, tokens in clips(model):
        path = root / "files" / f"{key}.vft"
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens.save(path)
    # in the order of the files
    rows = sorted((row_of(tokens, key) for key, tokens in clips(model)), key=lambda row: row["key"])
    (root / "tar").mkdir()
    for i in range(2):
        write_shard(root / "tar" / f"{i}.tar", rows[6 * i : 6 * i + 6])
    (root / "parquet").mkdir()
    return root, rows


def test_shards_give_the_losses_of_files(sources, model, tmp_path):
    root, rows = sources
    kinds = ["files", "tar"]
    try:
        write_shard(root / "parquet" / "a.parquet", rows)
        kinds.append("parquet")
    except ImportError:
        pass
    for kind in kinds:
        assert train(tmp_path / kind, root / kind, model, "--steps", "3") == 0
    assert len(losses(tmp_path / "files")) == 3
    assert [losses(tmp_path / kind) for kind in kinds] == [losses(tmp_path / "files")] * len(kinds)


def test_a_run_on_shards_is_resumed(sources, model, tmp_path):
    root, _ = sources
    assert train(tmp_path / "whole", root / "tar", model, "--steps", "4") == 0
    # the learning rate depends on the last step: stop at once, then go on
    assert train(tmp_path / "parts", root / "tar", model, "--steps", "4", "--minutes", "0") == 0
    assert len(losses(tmp_path / "parts")) == 1
    assert train(tmp_path / "parts", root / "tar", model, "--steps", "4") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_bad_shards_are_one_line(sources, model, tmp_path, capsys):
    root, rows = sources
    write_shard(tmp_path / "a.tar", [row | {"fingerprint": "0" * 16} for row in rows])
    assert train(tmp_path / "run", tmp_path / "a.tar", model) == 2
    assert "a.tar: fingerprint must be" in capsys.readouterr().err
    (tmp_path / "a.tar").write_bytes((root / "tar" / "0.tar").read_bytes()[:1000])
    assert train(tmp_path / "run", tmp_path / "a.tar", model) == 2
    error = capsys.readouterr().err
    assert "the shard must have" in error and error.count("\n") == 1
    assert train(tmp_path / "run", root / "tar", model, "--condition", "text") == 2
    assert "need data to be a folder of .vft files" in capsys.readouterr().err

"""Steps for other people's pipelines, as docs/scale.md shows them, where their packages are installed."""

import importlib
import re

import pytest
import video_files
from paths import ROOT

from vft import Tokenizer
from vft.config import make_config, parse_config
from vft.data import TokenDataset

BLOCK = re.compile(r"^```python no-run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown(package: str) -> dict:
    """What the block of docs/scale.md that imports the package defines."""
    pytest.importorskip(package)
    (code,) = [code for code in BLOCK.findall((ROOT / "docs" / "scale.md").read_text()) if f"from {package}" in code]
    scope: dict = {"__name__": package}
    exec(compile(code, "docs/scale.md", "exec"), scope)
    return scope


@pytest.fixture
def model():
    config = make_config(codec="linear", encoder_width=32, decoder_width=32, head_dim=32, registers=4, size=16)
    return Tokenizer(parse_config(config)).eval()


@pytest.fixture
def videos(tmp_path):
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for path in paths:
        video_files.encode(path, video_files.ramp(5))
    paths.append(tmp_path / "bad.mp4")
    paths[-1].write_bytes(b"no video")
    return paths


def test_a_step_of_datatrove(tmp_path, model, videos):
    step = shown("datatrove")["WriteTokens"](str(tmp_path / "out"), shard_size=2, model=model)
    (tmp_path / "out").mkdir()
    document = importlib.import_module("datatrove.data").Document
    given = [document(text=f"clip {v.stem}", id=v.stem, metadata={"path": str(v)}) for v in videos]
    for _ in range(2):
        passed = list(step.run(iter(given), rank=7))
        assert passed == given and [d.metadata["error"] is None for d in passed] == [True, True, True, False]
    assert {p.name for p in (tmp_path / "out").glob("*.tar")} == {"00007-00000.tar", "00007-00001.tar"}
    dataset = TokenDataset(tmp_path / "out")
    assert sorted((row["key"], row["caption"]) for row in dataset) == [(str(i), f"clip {i}") for i in range(3)]
    assert dataset.damaged() == {}


def test_a_stage_of_nemo_curator(tmp_path, model, videos):
    stage = shown("nemo_curator")["TokenStage"](str(tmp_path / "out"), model=model)
    (tmp_path / "out").mkdir()
    stage.setup()
    task = importlib.import_module("nemo_curator.tasks").FileGroupTask(
        dataset_name="clips", data=[str(v) for v in videos]
    )
    made = stage.process(task)
    assert made.dataset_name == "clips"
    dataset = TokenDataset(made.data[0])
    assert dataset.keys() == [str(v) for v in videos[:3]] and dataset.damaged() == {}

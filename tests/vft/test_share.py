"""A tokenizer as a folder or a repository: what is read back is the same model, and the card says what it is."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_tokenizer import small

import flexkernels
import vft
from vft import APG, CheckpointError, Tokenizer
from vft.vae import load_codec

EVALUATION = {"clips": 8, "steps": 4, "rate_distortion": {"held-out clips": {"1": {"psnr": 20.5}, "4": {"psnr": 24.0}}}}


def test_a_folder_is_the_same_model(tmp_path):
    model = small()
    model.steps, model.guidance = 7, APG(scale=3.0)
    model.save_pretrained(tmp_path / "mine", data="ten cats", evaluation=EVALUATION)
    read = Tokenizer.from_pretrained(tmp_path / "mine")
    assert (read.name, read.steps, read.guidance) == ("mine", 7, APG(scale=3.0))
    assert read.config == model.config
    for (name, a), (other, b) in zip(model.named_parameters(), read.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    video = torch.rand(1, 3, 5, 32, 32)
    assert torch.equal(model.encode(video).ids, read.encode(video).ids)
    card = (tmp_path / "mine" / "README.md").read_text()
    for fact in (
        "registers a latent frame | 4 |",
        "ten cats",
        "(64,000 ids)",
        "| 4 | 24 |",
        "7 steps",
        "32 x 32 pixels",
    ):
        assert fact in card
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_weights_of_the_codec_are_kept(tmp_path):
    model = small()
    model._codec_state = {name: tensor + 1 for name, tensor in load_codec("linear", None).state_dict().items()}
    model.save_pretrained(tmp_path)
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.codec_state and read.codec_state.keys() == model._codec_state.keys()
    assert all(torch.equal(read.codec_state[name], tensor) for name, tensor in model._codec_state.items())


def test_a_loaded_codec_moves_but_is_no_part_of_the_weights():
    model = small()
    names = list(model.state_dict())
    assert model.codec.scale.dtype == torch.float32
    assert list(model.state_dict()) == names and len(list(model.modules())) == len(list(small().modules()))
    assert model.double().codec.scale.dtype == torch.float64
    small().load_state_dict(model.state_dict())


def test_half_precision_and_no_weights(tmp_path):
    small().save_pretrained(tmp_path, dtype=torch.float16)
    assert Tokenizer.from_pretrained(tmp_path).dtype == torch.float32
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in small().parameters())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold one model\.safetensors"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="must be a folder, got a file"):
        small().save_pretrained(tmp_path / "config.json")


def test_push_uploads_what_can_be_read(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private, exist_ok))
            return SimpleNamespace(repo_id=f"org/{repo}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return f"https://hub/{repo_id}"

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Api))
    assert small().push_to_hub("clips", private=True, data="cats") == "https://hub/org/clips"
    assert calls == [("clips", True, True)]
    assert Tokenizer.from_pretrained(tmp_path / "uploaded").registers == 4
    assert "| training data | cats |" in (tmp_path / "uploaded" / "README.md").read_text()


def test_push_without_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'flexkernels\[hub\]'"):
        small().push_to_hub("clips")


def test_both_packages_are_typed():
    for package in (vft, flexkernels):
        assert (Path(package.__file__).parent / "py.typed").is_file()

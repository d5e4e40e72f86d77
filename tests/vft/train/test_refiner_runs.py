"""Runs that train a refiner: the tokenizer stays, frames get better, and what does not fit is named."""

from dataclasses import replace

import pytest
import torch
from train_worker import SMALL

import vft
from vft import cli
from vft.config import parse_config
from vft.metrics import psnr
from vft.train import procedural, refiner
from vft.train.refiner import RefinerSettings


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    path = tmp_path_factory.mktemp("refiner") / "old.safetensors"
    torch.manual_seed(1)
    vft.Tokenizer(parse_config(SMALL)).save(path, torch.float16)
    return path


def decoded(model, clips, keep):
    latents = model.codec.encode(clips)
    return model.codec.decode(torch.stack(model.decode_latents(model.encode_latents(latents), keep, 1, None)))


def test_frames_get_better_and_tokens_stay(old, tmp_path):
    before = vft.Tokenizer.from_pretrained(old)
    clips = procedural.batch(9, range(4), before.size, before.config.chunk_size)
    settings = RefinerSettings(tokenizer=str(old), steps=12, batch=4, clips=8, warmup=1, learning_rate=5e-3, ema=0.5)
    refiner.train(tmp_path, settings)
    after = vft.Tokenizer.from_pretrained(tmp_path)
    assert after.fingerprint == before.fingerprint and after.steps == before.steps
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    assert after.codec.refiner is not None and before.codec.refiner is None
    gains = [(psnr(decoded(after, clips, k), clips) - psnr(decoded(before, clips, k), clips)).mean() for k in (1, 2)]
    assert min(gains) > 0.5, gains
    # written anew, it is still there
    after.save(tmp_path / "again.safetensors", codec=after.codec_state)
    again = vft.Tokenizer.from_pretrained(tmp_path / "again.safetensors")
    assert torch.equal(decoded(again, clips, 2), decoded(after, clips, 2))
    # a refiner that goes on is a new one, of the frames without it
    refiner.train(tmp_path / "more", replace(settings, tokenizer=str(tmp_path), steps=1))
    lines = [(folder / "log.jsonl").read_text().splitlines()[0] for folder in (tmp_path, tmp_path / "more")]
    assert lines[0].split("grad")[0] == lines[1].split("grad")[0]


def test_a_run_is_resumed(old, tmp_path):
    settings = RefinerSettings(tokenizer=str(old), steps=3, batch=2, clips=4, warmup=1)
    refiner.train(tmp_path / "whole", settings)
    refiner.train(tmp_path / "parts", replace(settings, steps=2))
    refiner.train(tmp_path / "parts", settings)
    whole, parts = (vft.Tokenizer.from_pretrained(tmp_path / name).codec_state for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    # the rate falls over other steps
    assert all(torch.allclose(whole[name], parts[name], atol=0.01) for name in whole)
    with pytest.raises(ValueError, match=r"edges 1.0 \(now 2.0\)"):
        refiner.train(tmp_path / "parts", replace(settings, edges=2.0))


def test_what_does_not_fit_is_named(old, tmp_path, capsys):
    settings = RefinerSettings(tokenizer=str(old), steps=1, batch=1, clips=1)
    with pytest.raises(ValueError, match="give --tokenizer, not --from"):
        refiner.train(tmp_path / "a", replace(settings, start="tiny"))
    with pytest.raises(ValueError, match="corruption must be 0"):
        refiner.train(tmp_path / "a", replace(settings, corruption=0.1))
    with pytest.raises(ValueError, match="edges must be at least 0"):
        refiner.train(tmp_path / "a", replace(settings, edges=-1.0))
    argv = ["train", "refiner", "--tokenizer", str(old), "--steps", "1", "--batch", "2", "--clips", "2"]
    assert cli.main([*argv, "-o", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert cli.main(["train", "tokenizer", "-o", str(tmp_path / "b")]) == 2
    assert "trains a refiner, not a tokenizer" in capsys.readouterr().err

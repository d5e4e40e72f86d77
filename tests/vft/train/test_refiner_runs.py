"""Runs that train a refiner: the tokenizer stays, frames get better, and what does not fit is named."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from train_worker import SMALL

import vft
from vft import cli
from vft.config import make_config, parse_config
from vft.metrics import psnr
from vft.train import procedural, refiner
from vft.train.loop import Engine
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
    """Clips of two sizes, in two parts of a batch, come to the same; another tokenizer is noticed."""
    mine = tmp_path / "mine.safetensors"
    shutil.copy(old, mine)
    settings = RefinerSettings(tokenizer=str(mine), steps=3, batch=4, clips=8, warmup=1, sizes=(16, 32), frames=(5, 1))
    refiner.train(tmp_path / "whole", settings)
    for _ in range(3):
        refiner.train(tmp_path / "parts", settings, minutes=0)
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    refiner.train(tmp_path / "split", settings, engine=Engine(accumulate=2))
    split = load_file(tmp_path / "split" / "state.safetensors")
    assert all(torch.allclose(whole[name], split[name], atol=1e-4) for name in whole)
    with pytest.raises(ValueError, match=r"edges 1.0 \(now 2.0\)"):
        refiner.train(tmp_path / "parts", replace(settings, edges=2.0))
    torch.manual_seed(2)
    vft.Tokenizer(parse_config(SMALL)).save(mine)
    with pytest.raises(ValueError, match="was made with start"):
        refiner.train(tmp_path / "parts", replace(settings, steps=4))


def test_weights_that_float16_cannot_hold_stay(tmp_path):
    torch.manual_seed(3)
    before = vft.Tokenizer(parse_config(SMALL))
    before.save(tmp_path / "exact.safetensors")
    settings = RefinerSettings(tokenizer=str(tmp_path / "exact.safetensors"), steps=1, batch=1, clips=1, bf16=True)
    refiner.train(tmp_path / "run", settings)
    after = vft.Tokenizer.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))


def test_the_state_dict_of_another_codec_is_refused(tmp_path):
    vft.Tokenizer(parse_config(make_config(size=16))).save(tmp_path / "vidtok.safetensors")
    settings = RefinerSettings(tokenizer=str(tmp_path / "vidtok.safetensors"), steps=1)
    with pytest.raises(ValueError, match="must have an embedded codec"):
        refiner.train(tmp_path / "run", settings)


def test_what_does_not_fit_is_named(old, tmp_path, capsys):
    settings = RefinerSettings(tokenizer=str(old), steps=1, batch=1, clips=1)
    with pytest.raises(ValueError, match="give --tokenizer, not --from tiny"):
        refiner.train(tmp_path / "a", replace(settings, start="tiny"))
    with pytest.raises(ValueError, match="corruption must be 0"):
        refiner.train(tmp_path / "a", replace(settings, corruption=0.1))
    with pytest.raises(ValueError, match="optimizer must be adamw"):
        refiner.train(tmp_path / "a", replace(settings, optimizer="muon"))
    with pytest.raises(ValueError, match="checkpoint must be off"):
        refiner.train(tmp_path / "a", settings, engine=Engine(checkpoint=True))
    with pytest.raises(ValueError, match="edges must be at least 0"):
        refiner.train(tmp_path / "a", replace(settings, edges=-1.0))
    argv = ["train", "refiner", "--tokenizer", str(old), "--steps", "1", "--batch", "2", "--clips", "2"]
    assert cli.main([*argv, "-o", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert cli.main(["train", "tokenizer", "-o", str(tmp_path / "b")]) == 2
    assert "trains a refiner, not a tokenizer" in capsys.readouterr().err
    # what is refused is not offered
    assert cli.main(["train", "refiner", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--steps" in shown and not any(name in shown for name in ("--from", "--lora", "--optimizer", "--checkpoint"))

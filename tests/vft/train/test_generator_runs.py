"""Training the generator: the loss falls, a run resumes exactly, and a saved run generates."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vft
from vft import cli
from vft.codebook import fsq_features
from vft.config import make_config, parse_config
from vft.train import procedural
from vft.train.generator import GeneratorSettings, GeneratorTask, train


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer file with random weights, 4 registers of 64 ids, 16x16."""
    config = make_config(
        encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=4, codec="linear",
        levels=(4, 4, 4), size=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "small.safetensors"
    torch.manual_seed(0)
    model = vft.Tokenizer(parse_config(config), "small")
    with torch.no_grad():
        # as they start, all registers have one id
        for weight in (model.encoder.registers, model.encoder.head.weight):
            weight.mul_(10)
    model.save(path)
    return str(path)


@pytest.fixture
def settings(tokenizer):
    return GeneratorSettings(
        steps=4, batch=3, clips=7, warmup=2, bf16=False, tokenizer=tokenizer, depth=1, tokens_per_frame=2,
        class_dropout=0.5,
    )  # fmt: skip


def test_a_resumed_run_repeats_an_unbroken_one(tmp_path, settings):
    train(tmp_path / "whole", settings)
    for _ in range(4):
        train(tmp_path / "parts", settings, minutes=0)
    whole, parts = (load_file(tmp_path / run / "state.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any(name.startswith("optimizer.exp_avg_sq.") for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    with pytest.raises(ValueError, match="resume it with the same settings"):
        train(tmp_path / "whole", replace(settings, class_dropout=0.1))


@pytest.mark.parametrize("tables", ["fsq", "whole"])
def test_a_run_is_a_generator(tmp_path, settings, tokenizer, tables):
    train(tmp_path, replace(settings, tables=tables))
    gen = vft.Generator.from_pretrained(tmp_path / "model.safetensors")
    averaged = load_file(tmp_path / "state.safetensors")
    assert torch.equal(gen.sos, averaged["ema.sos"].half().float())
    head = averaged["ema.head.weight" if tables == "whole" else "ema.head.projection"].half().float()
    assert torch.equal(gen.head.weight, head if tables == "whole" else fsq_features((4, 4, 4)) @ head)
    assert (gen.classes, gen.tokenizer, gen.config.seq_len) == (procedural.FAMILIES, tokenizer, 10)
    ids = gen.generate(class_id="zoom", frames=5, tokens_per_frame=2, guidance=1.5)
    assert ids.shape == (1, 5, 2) and ids.max() < 64


@pytest.mark.parametrize("tables", ["fsq", "whole"])
def test_the_loss_is_the_cross_entropy_of_the_clips_ids(settings, tokenizer, tables):
    alone = replace(settings, class_dropout=0.0, clips=1, tables=tables)
    task = GeneratorTask(alone, vft.Tokenizer.from_pretrained(tokenizer))
    loss = task.loss(torch.Generator().manual_seed(0))
    clip = procedural.batch(0, [0], 16, 17)
    flat = vft.time_first(vft.Tokenizer.from_pretrained(tokenizer).encode(clip).ids[:, :2])
    assert len(set(flat.tolist())) > 5
    logits = task.model.logits(flat[None], procedural.label(0, 0))[0]
    assert loss.item() == pytest.approx(F.cross_entropy(logits, flat).item(), rel=1e-5)
    # without the class
    task = GeneratorTask(replace(alone, class_dropout=1.0), task.tokenizer)
    logits = task.model.logits(flat[None], unconditional=True)[0]
    loss = task.loss(torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(F.cross_entropy(logits, flat).item(), rel=1e-5)


def test_the_table_may_give_bfloat16(settings, tokenizer):
    """What autocast on CUDA makes of it; on the CPU it converts on the way."""
    task = GeneratorTask(settings, vft.Tokenizer.from_pretrained(tokenizer))
    model, ids, crossed = task.model, [torch.arange(7)], [None] * len(task.model.blocks)
    wanted = model.packed(ids, model.starts([0]), crossed)
    model.tok_emb.register_forward_hook(lambda _, args, out: out.bfloat16())
    torch.testing.assert_close(model.packed(ids, model.starts([0]), crossed), wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_few_clips_are_learned(tmp_path, settings, bf16):
    quick = replace(settings, steps=60, clips=3, learning_rate=1e-2, ema=0.5, class_dropout=0.1, bf16=bf16)
    train(tmp_path, quick)
    last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert '"step": 60' in last
    gen = vft.Generator.from_pretrained(tmp_path / "model.safetensors")
    clips = procedural.batch(0, [0, 1, 2], 16, 17)
    ids = torch.stack([tokens.ids[:, :2] for tokens in vft.Tokenizer.from_pretrained(settings.tokenizer).encode(clips)])
    flat = vft.time_first(ids)
    logits = gen.logits(flat, [procedural.label(0, i) for i in range(3)])
    assert F.cross_entropy(logits.flatten(0, 1), flat.flatten()) < 0.5 * math.log(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"class_dropout": 1.5}, "class_dropout must lie between 0 and 1"),
        ({"tokens_per_frame": 5}, r"tokens_per_frame must lie in 1..4, got 5"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"tables": "thin"}, "tables must be one of fsq, whole, got 'thin'"),
        ({"tokenizer": "nonsense"}, "nonsense"),
    ],
)
def test_settings_are_checked(tmp_path, settings, change, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, replace(settings, **change))


def test_the_command(tmp_path, tokenizer):
    options = ["--steps", "2", "--batch", "2", "--clips", "3", "--seed", "3"]
    argv = ["train", "generator", "-o", f"{tmp_path}/run", *options, "--tokenizer", tokenizer]
    assert cli.main([*argv, "--depth", "1", "-k", "3", "--class-dropout", "0.2", "--tables", "whole"]) == 0
    gen = vft.Generator.from_pretrained(tmp_path / "run" / "model.safetensors")
    assert (gen.config.depth, gen.config.seq_len) == (1, 15)


def test_a_run_of_the_other_kind_is_named(tmp_path, tokenizer, capsys):
    options = ["-o", str(tmp_path), "--steps", "1", "--batch", "1", "--clips", "1"]
    generator = ["train", "generator", *options, "--tokenizer", tokenizer, "--depth", "1", "-k", "1"]
    assert cli.main(generator) == 0
    assert cli.main(["train", "tokenizer", *options]) == 2
    error = f"vft: error: the run in {tmp_path} trains a generator, not a tokenizer: give another folder with -o\n"
    assert capsys.readouterr().err == error

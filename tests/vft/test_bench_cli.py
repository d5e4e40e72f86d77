"""``vft bench``: what it prints, what it counts as an op's least time, and one line for every wrong request."""

import json
import re

import pytest
import torch

import vft
from flexkernels import SequenceLayout
from vft import bench, cli, measure, profiling
from vft.config import make_config, parse_generator_config
from vft.train import initial

CEILING = {"copy_gb_s": 10.0, "read_gb_s": 10.0, "gemm_fp32_gflop_s": 100.0, "gemm_bf16_gflop_s": 200.0}
QUICK = ["--seconds", "0.01"]


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda device: CEILING)
    monkeypatch.setattr(measure, "ENOUGH_TURNS", 2)
    monkeypatch.setattr(measure, "FEWEST_TURNS", 2)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    raw = {"depth": 1, "vocab": 64, "seq_len": 40, "cond": "class", "n_classes": 3}
    path = tmp_path_factory.mktemp("generator") / "small.safetensors"
    vft.Generator(parse_generator_config(raw)).save(path)
    return str(path)


def rows_of(text: str) -> dict[str, float]:
    """{op: ms} of the printed table."""
    found = re.findall(r"^(\S+|\(.*?\)|[a-z]+ and [a-z ]*[a-z]) +(?:\d+ +)?([\d.]+) +[\d.]+%", text, re.MULTILINE)
    return {name: float(ms) for name, ms in found}


def test_decode_prints_rates(capsys):
    assert cli.main(["bench", "decode", "-k", "8", "--steps", "1", "--batch", "2", *QUICK]) == 0
    title, rates = capsys.readouterr().out.splitlines()
    assert title.startswith(
        "decode with tiny: batch 2, 17 frames of 64x64, keep 8 of 128, 1 steps of euler; float32 on"
    )
    ms, frames, tokens = re.fullmatch(
        r"([\d.]+) ms a call \(.*\), ([\d,.]+) frames/s, ([\d,]+) tokens/s", rates
    ).groups()
    frames, tokens = float(frames.replace(",", "")), float(tokens.replace(",", ""))
    assert frames == pytest.approx(2 * 17 * 1000 / float(ms), rel=0.02)
    assert tokens == pytest.approx(2 * 5 * 8 * 1000 / float(ms), rel=0.02)


def test_decode_profile_and_trace(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    argv = ["bench", "decode", "--steps", "1", "--guidance", "none", "--profile", "--trace", str(trace), "--top", "200"]
    assert cli.main([*argv, *QUICK]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert {"flexkernels::attention", "flexkernels::swiglu", "aten::mm", "(outside of ops)", "total"} <= rows.keys()
    assert not any(name.startswith("flexkernels_native") for name in rows)
    total = rows.pop("total")
    parts = {name: rows.pop(name) for name in ("VAE", "transformer", "sampler", "host and the rest")}
    assert sum(rows.values()) == pytest.approx(total, rel=0.01, abs=0.2)
    assert sum(parts.values()) == pytest.approx(total, rel=0.01, abs=0.2) and min(parts.values()) > 0
    assert parts["transformer"] > max(parts["VAE"], parts["sampler"])
    assert "copy 10 GB/s" in out and out.rstrip().endswith("(chrome://tracing or ui.perfetto.dev)")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "flexkernels::attention" in names


def test_encode_and_generate(generator, capsys):
    assert cli.main(["bench", "encode", "--frames", "2", "--profile", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "encode with tiny: batch 1, 5 frames of 64x64" in out and "of bound" in out
    argv = ["bench", "generate", "--model", generator, "-k", "3", "--frames", "2", "--token-guidance", "2"]
    assert cli.main([*argv, "--profile", "--top", "100", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "batch 1, 2 latent frames, 3 tokens each, guidance 2.0" in out and "frames/s" not in out
    rows = rows_of(out)
    assert any("transformer_step" in name for name in rows) and "flexkernels::sample_logits" in rows


def test_fp8_is_for_what_decodes_and_generates(capsys):
    argv = ["--fp8", "--profile", "--top", "200", *QUICK]
    assert cli.main(["bench", "decode", "--steps", "1", "--guidance", "none", *argv]) == 0
    # the rows that are rounded have their largest value looked for
    assert "aten::linalg_vector_norm" in rows_of(capsys.readouterr().out)
    assert cli.main(["bench", "encode", *argv]) == 2
    assert "bench encode has no such weights: leave out --int8 and --fp8" in capsys.readouterr().err


def test_train_profile(monkeypatch, capsys):
    # how a new model begins takes clips and no part of a step
    monkeypatch.setattr(initial, "fits", lambda *_: False)
    monkeypatch.setattr(profiling, "CALLS", 1)
    assert cli.main(["bench", "train", "--batch", "2", "--profile", "--top", "200", *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.startswith("train a new tokenizer: batch 2, 17 frames of 64x64; float32 on")
    rows = rows_of(out)
    parts = [rows[name] for name in ("clips and codec", "forward", "backward", "optimizer", "host and the rest")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(rows["total"], rel=0.01, abs=0.2)


def test_random_weights_of_a_config(tmp_path, capsys):
    size = {"encoder_width": 64, "encoder_depth": 1, "decoder_width": 64, "decoder_depth": 1, "registers": 4}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(make_config(**size, grid=5, codec="linear", size=32)))
    for what in ("encode", "decode"):
        assert cli.main(["bench", what, "--random", str(config), *QUICK]) == 0
        assert f"{what} with random: batch 1, 17 frames of 32x32" in capsys.readouterr().out
    config.write_text("{")
    assert cli.main(["bench", "encode", "--random", str(config), *QUICK]) == 2
    assert f"{config} must be a config.json, got Expecting" in capsys.readouterr().err
    assert cli.main(["bench", "train", "--model", "tiny", *QUICK]) == 2
    assert "leave out --model" in capsys.readouterr().err


def test_a_training_step_counts_the_tokens_of_all_latent_frames():
    job = bench.train_job(batch=3, device=torch.device("cpu"), bf16=False, seed=0)
    assert (job.frames, job.tokens) == (3 * 17, 3 * 5 * 32)


def test_labels_are_taken_back():
    class Owner:
        def method(self):
            return 1

    owner, own = Owner(), Owner()
    own.method = mine = lambda: 2
    with profiling.labelled([("a", owner, "method"), ("b", own, "method")]):
        assert owner.method() == 1 and own.method() == 2 and own.method is not mine
    assert "method" not in vars(owner) and own.method is mine


def test_bounds_count_bytes_once_and_flops():
    with profiling.Bounds(CEILING) as bounds:
        x = torch.ones(100, 50)
        x.add_(x)
        x @ torch.ones(50, 20)
        torch.ones(1, 20).expand(1000, 20).abs()
        x.view(50, 100)
        torch.ones(4, 4)[torch.tensor([1])]
    # bytes over 10 GB/s
    assert bounds.ms["aten::add_"] == pytest.approx(100 * 50 * 4 / 10e6)
    assert bounds.ms["aten::abs"] == pytest.approx((1000 * 20 + 20) * 4 / 10e6)
    moved = (100 * 50 + 50 * 20 + 100 * 20) * 4 / 10e6
    assert bounds.ms["aten::mm"] == pytest.approx(max(moved, 2 * 100 * 50 * 20 / 100e6))
    assert bounds.ms["aten::index"] is None and "aten::view" not in bounds.ms


def test_pairs_are_those_of_the_visited_tiles():
    full = SequenceLayout.from_lengths([100, 30])
    assert profiling.pairs(full.tensors) == 100 * 100 + 30 * 30
    causal = SequenceLayout([[(64, 0)] * 3], "frame_causal")
    assert profiling.pairs(causal.tensors) == 64 * 64 * (1 + 2 + 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["decode", "--trace", "a.json"], "--trace takes a .json file and needs --profile"),
        (["decode", "--profile", "--trace", "a.txt"], "--trace takes a .json file and needs --profile"),
        (["decode", "--size", "128"], "size must be 64, where tiny works, got 128"),
        (["decode", "-k", "129"], "keep must be between 1 and 128, got 129"),
        (["encode", "--frames", "1000"], "frames must be at most"),
        (["generate", "--random", "published"], "--random takes the place of --model"),
        (["decode", "--random", "published", "--model", "tiny"], "--random takes the place of --model"),
        (["sleep"], "invalid choice: 'sleep'"),
    ],
)
def test_wrong_requests(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vft: error: ") and message in error and error.count("\n") == 1

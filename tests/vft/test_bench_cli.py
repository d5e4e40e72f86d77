"""``vft bench``: what it prints, what it counts as an op's least time, and one line for every wrong request."""

import json
import re

import pytest
import torch

import vft
from flexkernels import SequenceLayout
from vft import cli, measure, profiling
from vft.config import parse_generator_config

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
    found = re.findall(r"^(\S+|\(.*?\)) +(?:\d+ +)?([\d.]+) +[\d.]+%", text, re.MULTILINE)
    return {name: float(ms) for name, ms in found}


def test_decode_prints_rates(capsys):
    assert cli.main(["bench", "decode", "-k", "8", "--steps", "1", "--batch", "2", *QUICK]) == 0
    title, rates = capsys.readouterr().out.splitlines()
    assert title.startswith("decode with tiny: batch 2, 17 frames of 64x64, keep 8 of 32, 1 steps of euler; float32 on")
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
    assert sum(rows.values()) == pytest.approx(total, rel=0.01, abs=0.2)
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
        (["decode", "-k", "33"], "keep must be between 1 and 32, got 33"),
        (["encode", "--frames", "1000"], "frames must be at most"),
        (["sleep"], "invalid choice: 'sleep'"),
    ],
)
def test_wrong_requests(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vft: error: ") and message in error and error.count("\n") == 1

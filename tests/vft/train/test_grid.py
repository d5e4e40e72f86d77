"""The grid of tokens that bench/grid.py compares with registers: causal, one token a patch, each in its place."""

import json
import sys

import grid
import pytest
import torch

import vft
from vft.config import make_config, parse_config
from vft.train import tokenizer

CONFIG = make_config(**tokenizer.TINY | {"codec": "lapped", "channels": 24, "registers": 16})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = grid.GridTokenizer(parse_config(CONFIG)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.steps, made.guidance = 2, vft.CFG(2.0)
    return made


def test_tokens_are_causal_and_samples_independent(model):
    latents = [torch.randn(24, 5, 8, 8), torch.randn(24, 3, 8, 8)]
    ids = model.encode_latents(latents)
    assert [i.shape for i in ids] == [(5, 16), (3, 16)]
    assert torch.equal(model.encode_latents([latents[0][:, :2]])[0], ids[0][:2])
    assert len(ids[0].unique()) > 40
    out = model.decode_latents(ids, seed=3, noise=latents)
    alone = model.decode_latents(ids[1:], seed=3, noise=latents[1:])
    torch.testing.assert_close(out[1], alone[0])
    # with clean first frames, their tokens say nothing
    prefix = [z[:, :1] for z in latents]
    other = [torch.cat([i[:1].flip(1), i[1:]]) for i in ids]
    given = [model.decode_latents(i, noise=latents, prefix=prefix) for i in (ids, other)]
    assert torch.equal(given[0][0], given[1][0])
    assert not torch.equal(given[0][0], out[0])
    # unconditionally no tokens do
    null = [model.velocity(latents, 0.5, i, unconditional=True)[0] for i in (ids, [i.flip(1) for i in ids])]
    assert torch.equal(*null)


def test_a_code_enters_at_its_patch(model):
    latents, codes = [torch.randn(24, 2, 8, 8)], torch.zeros(32, 6)
    packed = model.decoder.packing(latents, (grid.Member(0, 16),))
    changed = codes.clone()
    # token 6 of frame 1
    changed[16 + 6] = 1
    moved = model.decoder.embed_registers(changed, packed) - model.decoder.embed_registers(codes, packed)
    assert moved.abs().sum(1).nonzero().flatten().tolist() == [22]
    # in the order of the patches
    assert packed.order.tolist() == list(range(32))


@pytest.mark.slow
def test_the_comparison_runs(tmp_path, monkeypatch):
    argv = ["grid.py", "-o", str(tmp_path), "--steps", "2", "--generator-steps", "2", "--clips", "16", "--samples", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(tmp_path / "out.json")])
    monkeypatch.setattr(grid.evaluate, "judge", lambda *_: (grid.evaluate.classifier.Classifier().eval(), {}))
    grid.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["grid"]["generators"]) == {"16"} and set(found["registers"]["generators"]) == {"4", "16"}
    assert found["grid"]["generators"]["16"]["tokens a clip"] == 80
    assert found["grid"]["held-out clips"]["16"]["psnr"] > 5

"""Training: the loss and its gradients, exact resume, and that a saved run is a model."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import flexkernels
import vft
from vft.config import make_config, parse_config
from vft.train import tokenizer as trainer
from vft.train.loop import Settings, learning_rate
from vft.train.loss import draw, flow_loss
from vft.train.tokenizer import train

SMALL = make_config(
    encoder_width=32,
    encoder_depth=1,
    decoder_width=32,
    decoder_depth=1,
    head_dim=32,
    registers=4,
    codec="linear",
    size=16,
)
SETTINGS = Settings(steps=4, batch=3, clips=7, warmup=2, bf16=False)


def test_a_resumed_run_repeats_an_unbroken_one(tmp_path):
    train(tmp_path / "whole", SETTINGS, config=SMALL)
    train(tmp_path / "parts", SETTINGS, config=SMALL, minutes=0)
    state = load_file(tmp_path / "parts" / "state.safetensors")
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in state)
    for _ in range(3):
        train(tmp_path / "parts", SETTINGS, config=SMALL, minutes=0)
    whole, parts = (load_file(tmp_path / run / "state.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_run_is_a_model(tmp_path):
    train(tmp_path, SETTINGS, config=SMALL)
    model = vft.Tokenizer.from_pretrained(tmp_path / "model.safetensors")
    averaged = load_file(tmp_path / "state.safetensors")
    assert torch.equal(model.encoder.head.bias, averaged["ema.encoder.head.bias"].half().float())
    tokens = model.encode(torch.zeros(5, 16, 16, 3, dtype=torch.uint8))
    assert model.decode(tokens, steps=1).shape == (1, 3, 5, 16, 16)


def test_other_settings_are_refused(tmp_path):
    train(tmp_path, Settings(steps=1, batch=2, clips=3), config=SMALL)
    with pytest.raises(ValueError, match="resume it with the same settings"):
        train(tmp_path, Settings(steps=1, batch=3, clips=3), config=SMALL)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "flow_loss", lambda model, *_: model.encoder.head.bias.sum() * float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        train(tmp_path, SETTINGS, config=SMALL)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("field", ["steps", "batch", "clips", "warmup"])
def test_settings_are_checked(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        train(tmp_path, Settings(**{field: 0}), config=SMALL)


def test_learning_rate():
    settings = Settings(steps=100, warmup=10, learning_rate=1.0 - 1e-9)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[10])
    assert rates[100] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def model_and_batch():
    torch.manual_seed(1)
    model = vft.Tokenizer(parse_config(SMALL)).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(8, 16, 5, 2, 2, generator=generator)
    choices = draw(latents, model.registers, generator, prefix_probability=0.5, null_probability=0.3)
    assert set(choices.prefix_frames) == {0, 1}
    assert set(choices.null) == {False, True}
    return model, latents, choices


def test_loss_is_zero_for_the_true_velocity():
    model, latents, choices = model_and_batch()
    model.decoder.forward = lambda *_: [n - x for n, x in zip(choices.noise, latents, strict=True)]
    torch.nn.init.zeros_(model.encoder.head.weight)
    torch.nn.init.constant_(model.encoder.head.bias, 1.0)
    assert flow_loss(model, latents, choices) == 0
    # register values beyond the range cost something
    torch.nn.init.constant_(model.encoder.head.bias, -2.5)
    assert flow_loss(model, latents, choices).item() == pytest.approx(0.1)


def test_conditioning_frames_do_not_count():
    model, latents, choices = model_and_batch()

    def wrong_in_the_prefix(*_):
        velocity = [n - x for n, x in zip(choices.noise, latents, strict=True)]
        for v, frames in zip(velocity, choices.prefix_frames, strict=True):
            v[:, :frames] += 5
        return velocity

    model.decoder.forward = wrong_in_the_prefix
    torch.nn.init.zeros_(model.encoder.head.weight)
    assert flow_loss(model, latents, choices) == 0


def test_draws():
    generator = torch.Generator().manual_seed(0)
    choices = draw(torch.zeros(4000, 1, 5, 1, 1), 32, generator)
    assert (min(choices.keep), max(choices.keep)) == (1, 32)
    assert 0.08 < sum(choices.null) / 4000 < 0.12
    assert 0.22 < sum(choices.prefix_frames) / 4000 < 0.28
    # a quarter with all, and 1/64 + 1/12 of the others
    assert 0.30 < choices.keep.count(32) / 4000 < 0.35
    assert 0.47 < float((choices.t == 1).float().mean()) < 0.53
    assert 0.59 < float(choices.t[choices.t < 1].mean()) < 0.66
    # three tenths of the others are uniform
    assert 0.002 < float((choices.t < 0.02).float().mean()) < 0.01
    assert choices.prefix_t.max() <= 0.02


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_gradients_of_the_whole_loss_against_float64(backend, monkeypatch):
    """Through decoder, straight-through FSQ and encoder, against the dense float64 formulas."""
    if flexkernels.available_backends()[backend] is not None:
        pytest.skip(f"{backend}: {flexkernels.available_backends()[backend]}")
    model, latents, choices = model_and_batch()
    with flexkernels.backend(backend):
        flow_loss(model, latents, choices).backward()
    got = {name: p.grad for name, p in model.named_parameters()}

    wide, wide_latents, _ = model_and_batch()
    for op in ("attention", "qk_norm", "swiglu", "adaln_norm", "gated_residual_adaln_norm"):
        monkeypatch.setattr(flexkernels, op, getattr(flexkernels, op + "_ref"))
    monkeypatch.setattr(flexkernels, "fsq_quantize", straight_through)
    wide = wide.double()
    wide_choices = replace(choices, t=choices.t.double(), noise=[n.double() for n in choices.noise])
    flow_loss(wide, wide_latents.double(), wide_choices).backward()
    for name, p in wide.named_parameters():
        error = (got[name].double() - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, (name, float(error))


def straight_through(z, levels, *, ids):
    """The formula in z's own dtype: the code forward, the slope of bound(z) / (L // 2) backward."""
    levels = torch.tensor(levels, dtype=z.dtype)
    half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
    bound = (z + torch.atanh(offset / half)).tanh() * half - offset
    return (bound + (bound.round() - bound).detach()) / (levels // 2), None


def final_losses(folder, settings):
    train(folder, settings, config=SMALL)
    lines = (folder / "log.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines])


@pytest.mark.slow
def test_one_clip_is_learned_by_heart(tmp_path):
    losses = final_losses(tmp_path, replace(SETTINGS, steps=150, batch=4, clips=1, learning_rate=1e-2, warmup=10))
    assert losses[-30:].mean() < 0.5 * losses[:10].mean()


@pytest.mark.slow
def test_backends_learn_the_same(tmp_path):
    """200 steps from one seed; an id that rounds otherwise sends runs apart, so the curves are compared smoothed."""
    settings = replace(SETTINGS, steps=200, batch=4, clips=50, warmup=20)
    curves = []
    for backend in ("reference", "cpu"):
        with flexkernels.backend(backend):
            curves.append(final_losses(tmp_path / backend, settings))
    # the first steps step by step, the rest by means of 20
    torch.testing.assert_close(curves[0][:20], curves[1][:20], rtol=1e-4, atol=0)
    means = [curve.view(10, 20).mean(1) for curve in curves]
    torch.testing.assert_close(means[0], means[1], rtol=2e-2, atol=0)

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
from vft.train.loop import learning_rate
from vft.train.loss import draw, edge_error, flow_loss
from vft.train.tokenizer import TokenizerSettings, train
from vft.vae import load_codec

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
SETTINGS = TokenizerSettings(steps=4, batch=3, clips=7, warmup=2, bf16=False)


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
    train(tmp_path, TokenizerSettings(steps=1, batch=2, clips=3), config=SMALL)
    with pytest.raises(ValueError, match="resume it with the same settings"):
        train(tmp_path, TokenizerSettings(steps=1, batch=3, clips=3), config=SMALL)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "flow_loss", lambda model, *_: model.encoder.head.bias.sum() * float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        train(tmp_path, SETTINGS, config=SMALL)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("field", ["steps", "batch", "clips", "warmup"])
def test_settings_are_checked(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        train(tmp_path, TokenizerSettings(**{field: 0}), config=SMALL)


def test_learning_rate():
    settings = TokenizerSettings(steps=100, warmup=10, learning_rate=1.0 - 1e-9)
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


def test_edges_count_what_steps_between_pixels_differ(tmp_path):
    codec = load_codec("linear")
    difference = torch.randn(2, 16, 2, 2, 2, requires_grad=True)
    picture = codec.decode(difference.detach()) - codec.decode(torch.zeros(1, 16, 2, 2, 2))
    across, down = picture[..., 1:] - picture[..., :-1], picture[..., 1:, :] - picture[..., :-1, :]
    error = edge_error(codec, difference)
    wanted = across.square().mean((1, 2, 3, 4)) + down.square().mean((1, 2, 3, 4))
    torch.testing.assert_close(error.detach(), wanted)
    error.sum().backward()
    assert difference.grad.abs().min() > 0
    # all latents of one even picture but the first coefficient: a step of 0 inside blocks and between them
    plain = torch.zeros(1, 16, 1, 2, 2)
    assert edge_error(codec, plain) == 0


def test_with_edges_the_loss_is_larger_by_their_weight(tmp_path):
    def first_loss(folder, **changes):
        settings = TokenizerSettings(steps=1, batch=3, clips=7, **changes)
        train(tmp_path / folder, settings, config=SMALL)
        return json.loads((tmp_path / folder / "log.jsonl").read_text())["loss"]

    none, one, two = (first_loss(str(edges), edges=edges) for edges in (0.0, 1.0, 2.0))
    assert one > none and two - one == pytest.approx(one - none, rel=1e-3)
    assert first_loss("plain") == none
    vidtok = make_config(codec="vidtok_kl_causal_488_16chn", size=16)
    with pytest.raises(ValueError, match="edges must be at least 0 and finite, got -1"):
        train(tmp_path / "a", TokenizerSettings(edges=-1.0), config=vidtok)
    with pytest.raises(ValueError, match="early must lie between 0 and 1, got 2"):
        train(tmp_path / "a", TokenizerSettings(early=2.0), config=vidtok)


def test_early_registers_are_asked_for_most():
    latents = [torch.zeros(1, 1, 1, 1)] * 4000

    def shares(**options):
        keep = torch.tensor(draw(latents, 32, torch.Generator().manual_seed(0), full_probability=0, **options).keep)
        assert keep.min() == 1 and keep.max() == 32
        return [float((keep == k).float().mean()) for k in (1, 2, 31)], float((keep <= 4).float().mean())

    (one, two, many), few = shares(early_probability=1.0)
    # log(1 + 1 / k) / log(33)
    assert one == pytest.approx(0.198, abs=0.02) and two == pytest.approx(0.116, abs=0.02)
    assert many < 0.02 and few == pytest.approx(0.46, abs=0.03)
    assert shares()[1] < 0.36


def test_the_codec_decides_the_channels(tmp_path):
    with pytest.raises(ValueError, match="the config must have the codec's 16 channels, got 24"):
        train(tmp_path, SETTINGS, config=make_config(codec="linear", channels=24, size=16))
    small = make_config(
        encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, head_dim=32, registers=4, size=16,
        codec="lapped", channels=44,
    )  # fmt: skip
    train(tmp_path, TokenizerSettings(steps=1, batch=2, clips=3, edges=1.0, early=0.5, recipe=2), config=small)
    model = vft.Tokenizer.from_pretrained(tmp_path)
    assert model.codec.name == "lapped" and model.codec.channels == 44
    tokens = model.encode(torch.zeros(5, 16, 16, 3, dtype=torch.uint8))
    assert model.decode(tokens).shape == (1, 3, 5, 16, 16)

"""The tokenizer against what the published implementation computes (tests/data/tokenizer: small random models)."""

import pytest
import torch
from golden_tokenizer import CASES, KEEP, PIPELINES, assert_close, load, samples

import vft

VELOCITIES = {
    "vel_all_0": {},
    "vel_k16_0": {"keep": 16},
    "vel_k4_0": {"keep": 4},
    "vel_k1_0": {"keep": 1},
    "vel_uncond_0": {"unconditional": True},
    "vel_uncond_k4_0": {"unconditional": True, "keep": 4},
}
BATCHED = {
    "vel_batch": {},
    "vel_batch_uncond_mixed": {"unconditional": [False, True]},
    "vel_batch_prefix": {"prefix_frames": [1, 2]},
}


@pytest.mark.parametrize("case", CASES)
def test_encoder_and_tokens(case):
    model, io, _ = load(case)
    latents = samples(io, "latents")
    values = model.encoder(latents).split([x.shape[1] * model.registers for x in latents])
    for i, x in enumerate(latents):
        assert_close(case, f"enc_latents_{i}", values[i].view(x.shape[1], model.registers, -1))
    for ids, want in zip(model.encode_latents(latents), samples(io, "tokens"), strict=True):
        assert torch.equal(ids, want)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", VELOCITIES)
def test_velocity(case, name):
    model, io, facts = load(case)
    got = model.velocity([io["noised_0"][0]], facts["velocity_timestep"], [io["tokens_0"][0]], **VELOCITIES[name])
    assert_close(case, name, got[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "t"), [("vel_t1_0", 1.0), ("vel_t0.2_0", 0.2)])
def test_velocity_at_other_times(case, name, t):
    model, io, _ = load(case)
    assert_close(case, name, model.velocity([io["noised_0"][0]], t, [io["tokens_0"][0]], keep=4)[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unconditional", [False, True])
def test_velocity_with_a_clean_first_frame(case, unconditional):
    model, io, facts = load(case)
    x = io["noised_0"][0].clone()
    x[:, :1] = io["latents_0"][0][:, :1]
    arguments = {"keep": 4, "prefix_frames": 1, "unconditional": unconditional}
    got = model.velocity([x], facts["velocity_timestep"], [io["tokens_0"][0]], **arguments)
    assert_close(case, "vel_prefix1_uncond_0" if unconditional else "vel_prefix1_k4_0", got[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BATCHED)
def test_velocity_of_a_packed_batch(case, name):
    model, io, facts = load(case)
    x, ids = samples(io, "noised"), samples(io, "tokens")
    got = model.velocity(x, facts["velocity_timestep"], ids, keep=KEEP, **BATCHED[name])
    for i in (0, 1):
        assert_close(case, f"{name}_{i}", got[i])


def pipeline_arguments(settings, io):
    scale = settings["guidance_scale"]
    if settings.get("perform_norm_guidance"):
        guidance = vft.APG(scale, settings["norm_threshold"], settings["eta"], settings["momentum"])
    else:
        guidance = vft.CFG(scale)
    arguments = {"guidance": guidance, "steps": settings["timesteps"]}
    arguments["keep"] = settings["data_dict"].get("eval_keep_k")
    if "cond_vae_latents" in settings["data_dict"]:
        arguments["prefix"] = [io["latents_0"][0][:, :1]]
        arguments["prefix_mode"] = settings.get("cond_type", "clean")
    return arguments


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PIPELINES)
def test_sampler(case, name):
    model, io, facts = load(case)
    settings = facts["pipelines"][name]
    arguments = pipeline_arguments(settings, io)
    if name == "pipe_apg_mom_batch":
        arguments["compat"] = ["shared_momentum"]
    ids, noise = ([io[f"{key}_{i}"][0] for i in settings["samples"]] for key in ("tokens", "noise"))
    got = model.decode_latents(ids, noise=noise, **arguments)
    for i in settings["samples"]:
        assert_close(case, f"{name}_{i}", got[i])


def test_momentum_is_kept_per_sample_without_compat():
    """One buffer a sample: a batch equals its samples one by one, which the published shared buffer breaks."""
    model, io, _ = load("base")
    ids, noise, guidance = samples(io, "tokens"), samples(io, "noise"), vft.APG(25.0, momentum=-0.5)
    batch = model.decode_latents(ids, list(KEEP), 5, guidance, noise=noise)
    for i in (0, 1):
        single = model.decode_latents(ids[i : i + 1], KEEP[i], 5, guidance, noise=noise[i : i + 1])
        torch.testing.assert_close(batch[i], single[0], rtol=0, atol=2e-4)
    shared = model.decode_latents(ids, list(KEEP), 5, guidance, noise=noise, compat=["shared_momentum"])
    assert (shared[1] - batch[1]).abs().max() > 0.1


def test_ragged_batch_equals_samples_one_by_one():
    model, _, _ = load("base")
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 5, 8, 8), (16, 1, 4, 8), (16, 3, 6, 2), (16, 1, 4, 8)]
    latents = [torch.randn(s, generator=generator) for s in shapes]
    noise = [torch.randn(s, generator=generator) for s in shapes]
    keep = [16, 0, 3, 7]
    ids = model.encode_latents(latents)
    batch = model.decode_latents(ids, keep, 3, vft.APG(), noise=noise)
    for i in range(len(shapes)):
        assert torch.equal(ids[i], model.encode_latents(latents[i : i + 1])[0])
        single = model.decode_latents(ids[i : i + 1], keep[i], 3, vft.APG(), noise=noise[i : i + 1])
        torch.testing.assert_close(batch[i], single[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_fewer_tokens_mean_a_smaller_keep(case):
    model, io, _ = load(case)
    x, ids = [io["noised_0"][0]], io["tokens_0"][0]
    torch.testing.assert_close(
        model.velocity(x, 0.7, [ids[:, :4]]), model.velocity(x, 0.7, [ids], keep=4), rtol=0, atol=0
    )

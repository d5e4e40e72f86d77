"""Published tokenizers and generators, accelerated, against what the published code computes.

Stand-ins with golden weights are compared with stored results of that code. With a checkout that an environment
variable names, small random models of the code itself are compared before and after (see published.py).
"""

import contextlib
import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path

import published
import pytest
import standins
import torch
from golden_generator import conditions
from golden_generator import io as generator_io
from golden_tokenizer import CASES, KEEP, PIPELINES, assert_close, load
from paths import ROOT

import flexkernels
from flexkernels import integrations

GENERATORS = ("ar_class", "ar_text")


@pytest.fixture
def tokenizer():
    return flexkernels.accelerate(standins.tokenizer("base"))


@cache
def accelerated(case):
    return flexkernels.accelerate(standins.tokenizer(case))


def samples(io, name, rows=(0, 1)):
    return [io[f"{name}_{i}"] for i in rows]


def entries(io, rows=(0, 1), **more):
    codes = [flexkernels.fsq_dequantize(ids, (8, 8, 8, 5, 5, 5)) for ids in samples(io, "tokens", rows)]
    return {"quants": codes, **more}


@pytest.mark.parametrize("case", CASES)
def test_encoder_and_tokens(case):
    model, (_, io, _) = accelerated(case), load(case)
    data = model.encoder({"vae_latents": samples(io, "latents")})
    for i, values in enumerate(data["enc_latents"]):
        assert_close(case, f"enc_latents_{i}", values.squeeze(0))
        codes, ids = model.regularizer.forward_z(values)
        assert torch.equal(ids, io[f"tokens_{i}"]) and torch.equal(codes, entries(io)["quants"][i])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vel_batch", {}),
        ("vel_batch_uncond_mixed", {"eval_dropout_mask": [False, True]}),
        ("vel_batch_prefix", {"eval_prefix_len": [1, 2]}),
    ],
)
def test_decoder(case, name, more):
    model, (_, io, facts) = accelerated(case), load(case)
    times = torch.full((2,), facts["velocity_timestep"])
    data = entries(io, flow_noised_latents=samples(io, "noised"), flow_timesteps=times, eval_keep_k=list(KEEP), **more)
    for i, velocity in enumerate(model.decoder(data)["vae_latents_reconst"]):
        assert_close(case, f"{name}_{i}", velocity.squeeze(0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(case, name):
    model, (_, io, facts) = accelerated(case), load(case)
    settings = dict(facts["pipelines"][name])
    rows, data = settings.pop("samples"), settings.pop("data_dict")
    if name == "pipe_apg_mom_batch":
        model = flexkernels.accelerate(standins.tokenizer(case), compat="shared_momentum")
    data = entries(io, rows, **data)
    if "cond_vae_latents" in data:
        data["cond_vae_latents"] = [io["latents_0"][:, :, :1]]
    settings["video_sizes"] = [tuple(settings["video_sizes"])] * len(rows)
    noise = samples(io, "noise", rows)
    out = model.pipeline(data, noise_list=noise, verbose=False, **settings)["vae_latents_reconst"]
    for i, latents in zip(rows, out, strict=True):
        assert_close(case, f"{name}_{i}", latents.squeeze(0))


def test_fewer_registers_make_a_shorter_sequence(tokenizer):
    """As published: no mask tokens for the registers that are not given, unlike keep."""
    _, io, _ = load("base")
    data = entries(io, (0,))
    short = [q[:, :, :6] for q in data["quants"]]
    run = lambda **data: tokenizer.pipeline(  # noqa: E731
        data, timesteps=2, noise_list=samples(io, "noise", (0,)), video_sizes=(5, 8, 8), verbose=False
    )["vae_latents_reconst"][0]
    whole = run(quants=data["quants"], eval_keep_k=[6])
    assert not torch.allclose(run(quants=short), whole, atol=1e-2)
    with pytest.raises(ValueError, match="quants must have 1 to 16 registers"):
        run(quants=[torch.cat([q, q], -2) for q in data["quants"]])


def test_noise_comes_from_the_generator(tokenizer):
    _, io, _ = load("base")
    noise = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(3))
    data, options = entries(io, (0,)), dict(timesteps=2, video_sizes=[(5, 8, 8)], verbose=False)
    given = tokenizer.pipeline(dict(data), noise_list=[noise], **options)["vae_latents_reconst"][0]
    drawn = tokenizer.pipeline(dict(data), generator=torch.Generator().manual_seed(3), **options)
    assert torch.equal(given, drawn["vae_latents_reconst"][0])


def test_calls_that_the_published_loop_takes(tokenizer):
    _, io, _ = load("base")
    rescaler = lambda cfg, cond, uncond: cfg  # noqa: E731
    wavering = dict(guidance_scale=lambda t: 1 + t, perform_norm_guidance=True, momentum=-0.5)
    for options in (dict(cfg_rescaler=rescaler), wavering):
        with pytest.raises(NotImplementedError, match="the published loop"):
            tokenizer.pipeline(entries(io, (0,)), video_sizes=[(5, 8, 8)], **options)
    with pytest.raises(NotImplementedError, match="the published loop"):
        tokenizer.pipeline(entries(io, (0,), eval_dropout_mask=[True]), video_sizes=[(5, 8, 8)])


def test_weights_are_shared_and_restored():
    model = standins.tokenizer("base")
    before, pipeline = copy.deepcopy(model.state_dict()), model.pipeline
    objects = dict(model.named_parameters())
    held = sum(p.numel() for p in model.parameters())
    flexkernels.accelerate(model)
    engine = model.pipeline.engine
    inside = {id(p) for p in engine.tokenizer.parameters()}
    assert inside == {id(p) for p in objects.values()} and dict(model.named_parameters()) == objects
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    # padding of the gated MLP's hidden width is all that is added
    assert held <= sum(storages.values()) / 4 < 1.15 * held
    assert isinstance(model.pipeline, type(pipeline)) and not any(p.requires_grad for p in model.parameters())
    flexkernels.restore(model)
    assert model.pipeline is pipeline and all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(side) for side in (model.encoder, model.decoder))
    for name, p in model.named_parameters():
        assert p is objects[name] and torch.equal(p, before[name])
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes


def test_weights_that_moved_are_joined_again(tokenizer):
    _, io, _ = load("base")
    blocks = tokenizer.encoder.module_dict["enc_transformer"].blocks
    run = lambda: tokenizer.encoder({"vae_latents": samples(io, "latents")})["enc_latents"][0]  # noqa: E731
    first = run()
    for parameter in blocks.parameters():
        parameter.data = 0.5 * parameter.data
    assert not torch.allclose(run(), first, atol=1e-3)
    for parameter in blocks.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)


def test_another_dtype_computes_over_a_copy():
    model, (_, io, _) = standins.tokenizer("base"), load("base")
    flexkernels.accelerate(model, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    values = model.encoder({"vae_latents": samples(io, "latents")})["enc_latents"][0]
    assert values.dtype == torch.bfloat16
    error = (values[0].float() - io["enc_latents_0"][0]).norm() / io["enc_latents_0"].norm()
    assert 1e-5 < error < 0.05


def test_autocast_has_no_effect(tokenizer):
    _, io, _ = load("base")
    run = lambda: tokenizer.encoder({"vae_latents": samples(io, "latents")})["enc_latents"][0]  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    assert torch.equal(inside, run())


def test_level_1_leaves_the_pipeline(caplog):
    model = standins.tokenizer("base")
    pipeline = model.pipeline
    with caplog.at_level(logging.INFO, "flexkernels"):
        flexkernels.accelerate(model, level=1)
    assert model.pipeline is pipeline and "forward" in vars(model.decoder)
    assert "replaced regularizer, decoder, encoder; left vae, pipeline" in caplog.text


def test_an_encoder_that_reads_other_features_can_be_left():
    model, (_, io, facts) = standins.tokenizer("base"), load("base")
    model.encoder.module_dict["enc_patch_emb"].dim_in = 1040
    with pytest.raises(ValueError, match=r"patch_proj\.weight must have shape"):
        flexkernels.accelerate(model)
    flexkernels.accelerate(model, encoder=False)
    assert "forward" not in vars(model.encoder) and all(p.requires_grad for p in model.encoder.parameters())
    times = torch.full((1,), facts["velocity_timestep"])
    data = entries(io, (0,), flow_noised_latents=samples(io, "noised", (0,)), flow_timesteps=times, eval_keep_k=[4])
    assert_close("base", "vel_k4_0", model.decoder(data)["vae_latents_reconst"][0].squeeze(0))


def test_an_accelerated_model_is_freed():
    for make, case in ((standins.tokenizer, "base"), (standins.generator, "ar_class")):
        model = make(case)
        alive = weakref.ref(flexkernels.accelerate(model))
        del model
        gc.collect()
        assert alive() is None


def test_a_copy_has_an_engine_of_its_own(tokenizer):
    twin = copy.deepcopy(tokenizer)
    engine = twin.encoder.forward.__self__
    assert engine is twin.pipeline.engine is not tokenizer.pipeline.engine
    assert {id(p) for p in engine.tokenizer.parameters()} == {id(p) for p in twin.parameters()}
    _, io, _ = load("base")
    torch.testing.assert_close(
        twin.encoder({"vae_latents": samples(io, "latents")})["enc_latents"],
        tokenizer.encoder({"vae_latents": samples(io, "latents")})["enc_latents"], rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("by", ["pickle", "torch.save"])
def test_a_pickle_computes_the_same(tokenizer, tmp_path, by):
    generator = flexkernels.accelerate(standins.generator("ar_class"))
    with standins.importable():
        if by == "pickle":
            twin, other = (pickle.loads(pickle.dumps(model)) for model in (tokenizer, generator))
        else:
            torch.save((tokenizer, generator), tmp_path / "models.pt")
            twin, other = torch.load(tmp_path / "models.pt", weights_only=False)
    assert twin.encoder.forward.__self__ is twin.pipeline.engine is not tokenizer.pipeline.engine
    assert type(twin.pipeline).__bases__ == type(tokenizer.pipeline).__bases__
    _, io, _ = load("base")
    values = [m.encoder({"vae_latents": samples(io, "latents")})["enc_latents"] for m in (twin, tokenizer)]
    torch.testing.assert_close(*values, rtol=0, atol=0)
    assert torch.equal(twin.regularizer.forward_z(values[0][0])[1], tokenizer.regularizer.forward_z(values[0][0])[1])
    options = dict(length=20, temperature=0, device="cpu", **conditions("ar_class"))
    assert torch.equal(other.sample(3, **options), generator.sample(3, **options))
    assert other.sample.__self__.model is other


def test_a_weight_that_would_not_be_used_is_refused():
    model = standins.tokenizer("base")
    model.decoder.module_dict["dec_transformer"].blocks[1].attn.wq.bias = torch.nn.Parameter(torch.zeros(192))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.wq\.bias is not a weight"):
        flexkernels.accelerate(model)


def spoil(model, path, **attributes):
    for name, value in attributes.items():
        setattr(model.get_submodule(path), name, value)


@pytest.mark.parametrize(
    ("path", "attributes", "message"),
    [
        (
            "encoder.module_dict.enc_register_module",
            {"forward": None},
            "enc_register_module must compute what its class",
        ),
        ("decoder.module_dict.dec_transformer.blocks.0.attn", {"scale": 0.125001}, "softmax scale"),
        (
            "decoder.module_dict.dec_transformer",
            {"rope_forward_read_key": "rope"},
            "rope_forward_read_key must be None",
        ),
        ("decoder.module_dict.dec_patches_posemb_module", {"posemb_scaling": "interpolate"}, "posemb_scaling must be"),
        (
            "encoder.module_dict.enc_seq_packer",
            {"input_list_read_keys": ["enc_registers", "enc_patches"]},
            "packer must",
        ),
        ("encoder.module_dict.enc_patch_emb", {"input_tensor_list_read_key": "features"}, "'features' must come from"),
    ],
)
def test_a_model_that_computes_something_else_is_refused_untouched(path, attributes, message):
    model = standins.tokenizer("base")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    spoil(model, path, **attributes)
    with pytest.raises(ValueError, match=message):
        flexkernels.accelerate(model)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters()) and "forward" not in vars(model.decoder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 3}, ValueError, "level must be 1 or 2"),
        ({"compat": "noise"}, ValueError, "compat must be among shared_momentum"),
        ({"speed": 9}, TypeError, "speed"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        flexkernels.accelerate(standins.tokenizer("base"), **options)


def test_wrong_calls(tokenizer):
    _, io, _ = load("base")
    with pytest.raises(ValueError, match="register_sizes must be 16"):
        tokenizer.encoder({"vae_latents": samples(io, "latents"), "register_sizes": [8, 8]})
    with pytest.raises(ValueError, match=r"vae_latents must be \[1, 16, ...\]"):
        tokenizer.encoder({"vae_latents": [io["latents_0"][:, :8]]})
    with pytest.raises(RuntimeError, match="only infers"):
        tokenizer.train().encoder({"vae_latents": samples(io, "latents")})


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("case", GENERATORS)
def test_generator_greedy_ids(case, guidance):
    model = standins.generator(case)
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    flexkernels.accelerate(model)
    ids = model.sample(3, length=40, cfg=guidance, temperature=0, device="cpu", **conditions(case))
    assert torch.equal(ids, generator_io(case)[f"greedy_ids_cfg{guidance}"])
    w1, w3 = model.blocks[0].ffn.w1.weight, model.blocks[0].ffn.w3.weight
    assert w1.untyped_storage().data_ptr() == w3.untyped_storage().data_ptr()
    flexkernels.restore(model)
    assert "sample" not in vars(model) and all(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        assert p is objects[name] and torch.equal(p, before[name]) and p.untyped_storage().nbytes() == p.nbytes


def test_generator_draws_follow_the_random_generator():
    model = flexkernels.accelerate(standins.generator("ar_class"))
    draw = lambda seed: model.sample(  # noqa: E731
        3, length=20, top_k=50, top_p=0.9, device="cpu", generator=torch.Generator().manual_seed(seed),
        **conditions("ar_class"),
    )  # fmt: skip
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_generator_null_class():
    model = flexkernels.accelerate(standins.generator("ar_class"))
    options = dict(length=10, temperature=0, device="cpu")
    assert torch.equal(model.sample(2, **options), model.sample(2, class_id=torch.tensor([7, 7]), **options))


def test_a_generator_of_other_norms_is_refused():
    model = standins.generator("ar_class")
    model.blocks[0].n1.eps = 1e-5
    with pytest.raises(ValueError, match="norms of eps"):
        flexkernels.accelerate(model)


# how flexkernels finds what it does not know


def test_flexkernels_does_not_import_vft():
    sources = Path(flexkernels.__file__).parent.rglob("*.py")
    assert [s for s in sources if "import vft" in s.read_text() or "from vft" in s.read_text()] == []


def test_the_project_announces_the_integrations():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    announced = project["project"]["entry-points"][integrations.GROUP]
    assert set(announced) == {"videoflextok", "flextok", "semantok"}
    assert announced.items() <= {point.name: point.value for point in integrations._integrations()}.items()


def test_an_integration_is_found_without_an_import_of_vft():
    code = """
        import sys
        import flexkernels, standins
        model = standins.tokenizer("base")
        assert "vft.integrations" not in sys.modules
        flexkernels.accelerate(model)
        print(type(model.pipeline).__mro__[1].__module__)
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "vft.integrations.videoflextok", done.stderr


def test_an_installed_package_announces_its_own(tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text(
        "from flexkernels.integrations import Change\n"
        "knows = lambda model: type(model).__name__ == 'Strange'\n"
        "def accelerate(model, *, much=1):\n"
        "    model.much = much\n"
        "    return Change(['much'], [], lambda: delattr(model, 'much'))\n"
    )
    metadata = tmp_path / "strange-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{integrations.GROUP}]\nstrange = strange\n")
    model = type("Strange", (), {})()
    with pytest.raises(TypeError, match=r"diffusers, .*videoflextok.*; found nothing known in .*Strange"):
        flexkernels.accelerate(model)
    monkeypatch.syspath_prepend(tmp_path)
    assert flexkernels.accelerate(model, much=3).much == 3
    assert "much" not in vars(flexkernels.restore(model))
    with pytest.raises(TypeError, match="options of strange must be among much, got more"):
        flexkernels.accelerate(model, more=1)


# the published code itself


def checkout(variable):
    reason = published.use_checkout(variable)
    if reason:
        pytest.skip(reason)


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@contextlib.contextmanager
def as_accelerated(model, **options):
    before = published.snapshot(model)
    yield flexkernels.accelerate(model, **options)
    flexkernels.restore(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


VIDEO_CALLS = {
    "keep lists and APG": dict(num_keep_tokens_list=[4, 11], guidance_scale=5.0, perform_norm_guidance=True),
    "conditioning frames and CFG": dict(guidance_scale=3.0, conditioning=5),
    "sdedit": dict(conditioning=1, cond_type="sdedit"),
    "momentum": dict(guidance_scale=lambda t: 5 * t + 2, perform_norm_guidance=True, momentum=-0.5, eta=0.3),
    "truncated tokens": dict(truncate=6, guidance_scale=lambda t: 4.0 if t > 0.5 else 1.0),
}


@torch.no_grad()
@pytest.mark.parametrize("level", [1, 2])
def test_published_videoflextok(level):
    checkout("FLEXKERNELS_VIDEOFLEXTOK")
    model = published.build(published.video_config())
    video = torch.rand(2, 3, 17, 64, 64) * 2 - 1
    compat = ["shared_momentum"] if level == 2 else []

    def tokenize():
        return model.tokenize({"rgb": list(video.split(1))})

    def detokenize(ids, conditioning=0, truncate=None, **options):
        frames = list(video[:, :, :conditioning].split(1)) if conditioning else None
        return model.detokenize(
            [i[..., :truncate] for i in ids], vae_video_sizes=[(5, 8, 8)] * 2, conditioning_frames=frames, timesteps=3,
            generator=torch.Generator().manual_seed(1), verbose=False, **options,
        )  # fmt: skip

    ids = tokenize()
    want = {name: detokenize(ids, **options) for name, options in VIDEO_CALLS.items()}
    with as_accelerated(model, level=level, compat=compat):
        assert all(torch.equal(a, b) for a, b in zip(tokenize(), ids, strict=True))
        for name, options in VIDEO_CALLS.items():
            for got, exact in zip(detokenize(ids, **options), want[name], strict=True):
                assert error(got, exact) < 1e-5, name
    again = detokenize(ids, **VIDEO_CALLS["momentum"])
    assert all(torch.equal(a, b) for a, b in zip(again, want["momentum"], strict=True))


@torch.no_grad()
def test_published_chunks():
    """The wrapper that cuts long video into chunks is found through its tokenizer."""
    checkout("FLEXKERNELS_VIDEOFLEXTOK")
    from videoflextok.wrappers import VideoChunkTokenizerWrapper

    model = VideoChunkTokenizerWrapper(published.build(published.video_config()), 17, 1, [(5, 8, 8)])
    video = torch.rand(1, 3, 33, 64, 64) * 2 - 1

    def run():
        ids = model.tokenize(video)
        options = dict(timesteps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(1), verbose=False)
        return ids[0], model.detokenize(ids, num_keep_tokens_list=[8], **options)[0]

    ids, want = run()
    with as_accelerated(model):
        tokens, got = run()
    assert torch.equal(tokens, ids) and got.shape == video.shape and error(got, want) < 1e-4


@torch.no_grad()
def test_published_flextok():
    checkout("FLEXKERNELS_FLEXTOK")
    model = published.build(published.image_config())
    images = torch.rand(2, 3, 64, 64) * 2 - 1

    def detokenize(ids, **options):
        short = [ids[0], ids[1][:, :5]]
        return model.detokenize(
            short, vae_image_sizes=8, timesteps=3, generator=torch.Generator().manual_seed(1), verbose=False, **options
        )

    calls = [{}, dict(guidance_scale=5.0, perform_norm_guidance=True), dict(guidance_scale=3.0)]
    ids = model.tokenize(images)
    want = [detokenize(ids, **options) for options in calls]
    with as_accelerated(model):
        assert all(torch.equal(a, b) for a, b in zip(model.tokenize(images), ids, strict=True))
        for options, exact in zip(calls, want, strict=True):
            assert error(detokenize(ids, **options), exact) < 1e-5
    assert torch.equal(detokenize(ids), want[0])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"n_classes": 5}, {"ctx_dim": 24, "n_ctx_null": 4, "head_bias": True}])
def test_published_semantok(sizes):
    checkout("FLEXKERNELS_SEMANTOK")
    from semantok.ar import SemanTokAR

    model = SemanTokAR(depth=3, vocab=500, seq_len=40, **sizes).eval()
    published.randomize(model)
    mask = torch.ones(3, 6)
    mask[1, 3:], mask[2] = 0, 0
    classes = {"class_id": torch.tensor([0, 4, 5])}
    condition = classes if "n_classes" in sizes else {"text_emb": torch.randn(3, 6, 24), "text_mask": mask}
    calls = [dict(n=3, cfg=2.5, **condition), dict(n=3, length=17, **condition), dict(n=2)]
    run = lambda: [model.sample(**c, temperature=0.0, device="cpu", dtype=torch.float32) for c in calls]  # noqa: E731
    want = run()
    with as_accelerated(model):
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))

"""Runs that continue a checkpoint: what is reused and what is new, low-rank factors, and that it is worth it."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import flexkernels
import vft
from vft import checkpoint, cli
from vft.config import make_config, parse_config
from vft.evaluate import held_out
from vft.packing import Member
from vft.train import generator, procedural, start, teach, tokenizer
from vft.train.generator import GeneratorSettings
from vft.train.tokenizer import TINY, TokenizerSettings
from vft.words import embed

SMALL = make_config(
    encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=4, codec="linear",
    levels=(4, 4, 4), grid=5, size=16,
)  # fmt: skip
# registers of the embedded tokenizer
KNOWN = vft.Tokenizer.from_pretrained("tiny").registers
SETTINGS = TokenizerSettings(steps=2, batch=2, clips=4, warmup=1)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A saved tokenizer whose every part matters."""
    path = tmp_path_factory.mktemp("start") / "old.safetensors"
    torch.manual_seed(3)
    model = vft.Tokenizer(parse_config(SMALL))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save(path)
    return path


@pytest.fixture(scope="module")
def old_generator(old, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start_generator")
    settings = GeneratorSettings(steps=2, batch=2, clips=4, tokenizer=str(old), depth=1, tokens_per_frame=3)
    generator.train(folder, settings)
    return folder


def test_other_sizes_keep_what_was_learned(old):
    before = vft.Tokenizer.from_pretrained(old)
    model, begin = start.tokenizer(str(old), registers=6, size=64, frames=33)
    assert (model.registers, model.size, model.config.chunk_size) == (6, 64, 33)
    width = 32
    # 9 latent frames in place of 5; positions of 5, 5 and 5 become 9 each, of 5 registers 9
    assert begin.new["encoder.registers"] == (9 * 6 - 5 * 4) * width
    assert begin.new["encoder.patch_posemb.table"] == begin.new["decoder.patch_posemb.table"] == 3 * 4 * width
    assert begin.describe().startswith(f"from {old}: ") and "encoder.registers (1,088 values)" in begin.describe()
    latents = [torch.randn(16, 5, 2, 2)]
    values = model.eval().encoder(latents).view(5, 6, 3)
    # earlier registers do not see later ones of their frame, but those of the frames before
    assert torch.allclose(values[0, :4], before.encoder(latents).view(5, 4, 3)[0], atol=1e-5)
    assert model.encode_latents([torch.randn(16, 9, 8, 8)])[0].shape == (9, 6)
    fewer, begin = start.tokenizer(str(old), registers=2)
    assert fewer.registers == 2 and not begin.new


def test_new_registers_speak_of_places_that_others_speak_of():
    """The places of those of the embedded model, by turns, of which each says something of its own."""
    torch.manual_seed(0)
    model, _ = start.tokenizer("tiny", registers=KNOWN + 8)
    latents = list(model.codec.encode(procedural.batch(5, range(16))))
    with torch.no_grad():
        values = model.eval().encoder(latents).view(16, 5, KNOWN + 8, 6)
        # one corner of the picture changes: registers whose place it is are those that notice
        changed = [x.clone() for x in latents]
        for x in changed:
            x[:, :, :2, :2] = 0
        moved = (model.encoder(changed).view(16, 5, KNOWN + 8, 6) - values).square().mean((0, 1, 3))
    twins = torch.stack([moved[KNOWN:], moved[:8]]).log()
    assert torch.corrcoef(twins)[0, 1] > 0.5
    # shares of the variance that no linear map of the twin's values has
    left = []
    for i in range(8):
        x, y = (values[:, :, j].flatten(0, 1).double() for j in (i, KNOWN + i))
        x, y = x - x.mean(0), y - y.mean(0)
        left.append((y - x @ torch.linalg.lstsq(x, y).solution).square().sum() / y.square().sum())
    assert sum(left) / 8 > 0.1, left


def test_another_codec_starts_with_the_same_tokens(old, tmp_path):
    """The lapped codec's first channels follow the linear one's, and the encoder is blind to the rest."""
    before, (model, begin) = vft.Tokenizer.from_pretrained(old), start.tokenizer(str(old), codec="lapped", channels=24)
    assert model.codec.name == "lapped" and model.config.channels == model.codec.channels == 24
    clips = procedural.batch(5, range(4), size=16)
    values, old_values = (torch.cat([m.encoder(list(m.codec.encode(clips)))]) for m in (model.eval(), before))
    assert (values - old_values).square().mean() < 0.05 * old_values.var(0).mean()
    # 8 new channels of 2 x 2 latents, 32 wide
    assert begin.new == {
        "encoder.patch_embed.weight": 1024, "decoder.patch_embed.weight": 1024, "decoder.head.weight": 1024,
        "decoder.head.bias": 32,
    }  # fmt: skip
    model.save(tmp_path / "lapped.safetensors")
    for codec, channels in (("linear", 24), ("lapped", 16)):
        with pytest.raises(ValueError, match="codec must be one whose first channels are those of 'lapped' of 24, got"):
            start.tokenizer(str(tmp_path / "lapped.safetensors"), codec=codec, channels=channels)
    assert cli.main(["train", "tokenizer", "-o", str(tmp_path / "c"), "--channels", "24"]) == 2


def test_new_channels_have_a_velocity_before_the_first_step():
    new, clips = 44 - vft.Tokenizer.from_pretrained("tiny").config.channels, procedural.batch(5, range(4))
    settings = TokenizerSettings(clips=16, start="tiny", codec="lapped", channels=44)
    model = tokenizer.TokenizerTask(settings, {}).model.eval()
    noise = torch.randn(model.codec.latent_shape(17, 64, 64))
    latents = model.codec.encode(clips)
    codes, _ = flexkernels.fsq_quantize(model.encoder(list(latents)), model.config.levels, ids=False)
    velocity = torch.stack(model.decoder([noise] * 4, torch.ones(1), codes, [KNOWN] * 4, [0] * 4, [False] * 4))[
        :, -new:
    ]
    wanted = (noise - latents)[:, -new:]
    # without the fit a head of zeros, which is wrong by all of it
    assert (velocity - wanted).square().mean() < 0.85 * wanted.square().mean()


def test_tables_that_are_stored_do_not_grow(old, tmp_path):
    model = vft.Tokenizer.from_pretrained(old)
    raw = model.config.raw
    entry = raw["video_flex_tok"]["encoder"]["module_dict"]["enc_posemb_module"]
    entry["posemb_type"] = "sincos"
    fixed = vft.Tokenizer(parse_config(raw))
    fixed.save(tmp_path / "fixed.safetensors")
    start.tokenizer(str(tmp_path / "fixed.safetensors"), size=64)
    with pytest.raises(
        ValueError, match=r"encoder.patch_posemb.table must cover a grid of \[5, 8, 8\], got a stored tab"
    ):
        start.tokenizer(str(tmp_path / "fixed.safetensors"), size=128)


def test_a_run_from_a_checkpoint(old, tmp_path, capsys):
    settings = replace(SETTINGS, start=str(old), registers=5, learning_rate=1e-6)
    tokenizer.train(tmp_path / "run", settings, config=SMALL)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"from {old}: ") and "new: encoder.registers" in first
    assert last == (
        f"{tmp_path / 'run'}/model.safetensors: step 2 of 2. "
        f"Next: vft reconstruct VIDEO -o out.mp4 --model {tmp_path / 'run'}"
    )
    before, after = (vft.Tokenizer.from_pretrained(path) for path in (old, tmp_path / "run"))
    assert after.registers == 5 and after.fingerprint != before.fingerprint
    assert torch.allclose(after.encoder.head.weight, before.encoder.head.weight, atol=1e-3)
    with pytest.raises(ValueError, match=r"was made with .*, registers 5 \(now 4\)"):
        tokenizer.train(tmp_path / "run", replace(settings, registers=4), config=SMALL)


def test_a_changed_checkpoint_is_not_resumed(old, tmp_path):
    copy = tmp_path / "copy.safetensors"
    model = vft.Tokenizer.from_pretrained(old)
    model.save(copy)
    settings = replace(SETTINGS, start=str(copy))
    tokenizer.train(tmp_path / "run", settings, config=SMALL, minutes=0)
    model.decoder.head.bias.add_(1)
    model.save(copy)
    with pytest.raises(ValueError, match="was made with start"):
        tokenizer.train(tmp_path / "run", settings, config=SMALL)


def test_factors_are_trained_alone_and_merged(old, tmp_path):
    settings = replace(SETTINGS, start=str(old), lora=2, learning_rate=0.05, registers=5)
    tokenizer.train(tmp_path / "whole", settings, config=SMALL)
    for _ in range(2):
        tokenizer.train(tmp_path / "parts", settings, config=SMALL, minutes=0)
    state, again = (load_file(tmp_path / run / "state.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    trained = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    layers = {
        name.rsplit(".parametrizations", 1)[0] for name in trained if name.endswith("parametrizations.weight.0.b")
    }
    # 4 of attention, 3 of the MLP; adaLN in the decoder
    assert len(layers) == 7 + 8
    assert {n for n in trained if ".parametrizations" not in n} == {"encoder.registers"}
    before, after = (dict(vft.Tokenizer.from_pretrained(path).named_parameters()) for path in (old, tmp_path / "whole"))
    for name, value in after.items():
        if name == "encoder.registers":
            continue
        changed = (value - before[name].half().float()).abs().max() > 1e-3
        assert changed == (name.removesuffix(".weight") in layers), name
    layer = "decoder.blocks.0.attn.wq"
    a, b = (state[f"ema.{layer}.parametrizations.weight.0.{x}"] for x in "ab")
    assert torch.allclose(after[f"{layer}.weight"], before[f"{layer}.weight"] + b @ a, atol=2e-3)


def test_a_generator_with_new_classes_knows_the_old_ones(old, old_generator, tmp_path):
    weights = start.read_generator(str(old_generator))
    before = vft.Generator.from_pretrained(old_generator)
    names = ("new", *before.classes[::-1])
    raw = weights.config | {"n_classes": len(names), "classes": list(names), "tokenizer": str(old)}
    task = generator.GeneratorTask(
        GeneratorSettings(clips=4, tokenizer=str(old), depth=9, tokens_per_frame=3, start=str(old_generator)),
        vft.Tokenizer.from_pretrained(old), weights,
    )  # fmt: skip
    assert not task.start.new and task.model.config.depth == 1
    model = task._build(generator.parse_generator_config({k: v for k, v in raw.items() if k != "fsq_levels"}))
    begin = start.generator(model, "x", weights)
    assert begin.new == {"cls_emb.weight": 64}
    model.eval()
    ids = torch.randint(64, (1, 15))
    with torch.no_grad():
        got = model.teacher_forced(ids, [names.index("zoom")])
        null = model.teacher_forced(ids, [None])
    assert torch.allclose(got, before.logits(ids, "zoom"), atol=1e-4)
    assert torch.allclose(null, before.logits(ids, unconditional=True), atol=1e-4)


def test_a_generator_of_classes_goes_on_with_captions(old, old_generator, tmp_path):
    before = vft.Generator.from_pretrained(old_generator)
    settings = GeneratorSettings(
        steps=2, batch=2, clips=4, tokenizer="", tokens_per_frame=3, start=str(old_generator), warmup=1, data="named",
        condition="text",
    )  # fmt: skip
    task = generator.GeneratorTask(settings, vft.Tokenizer.from_pretrained(old), start.read_generator(old_generator))
    lost = sum(p.numel() for name, p in before.named_parameters() if name == "cls_emb.weight")
    kept = sum(p.numel() for p in task.model.parameters()) - sum(task.start.new.values())
    with safe_open(old_generator / "model.safetensors", "pt") as file:
        assert kept == sum(file.get_tensor(name).numel() for name in file.keys()) - lost
    # before a step, whatever is said: the null class
    ids = torch.randint(64, (2, 15))
    with torch.no_grad():
        got = task.model.eval().teacher_forced(ids, [task.data.captions([0])[0], None])
    torch.testing.assert_close(got, before.logits(ids, unconditional=True), atol=1e-4, rtol=0)
    generator.train(tmp_path, settings)
    after = vft.Generator.from_pretrained(tmp_path)
    said = [after.logits(ids[:1], text_emb=emb, text_mask=mask) for emb, mask in map(embed, (["red"], ["blue"]))]
    assert not torch.equal(*said)
    # by factors alone, what is new is trained whole
    generator.train(tmp_path / "lora", replace(settings, lora=2, steps=1))
    factored = vft.Generator.from_pretrained(tmp_path / "lora")
    assert torch.equal(factored.pos_emb, before.pos_emb) and factored.blocks[0].xattn.proj.weight.any()
    # a config that states all its fields, and damage
    config, tensors = start.read_generator(old_generator)
    raw = {"cond": "text", "vocab": 64, "ctx_dim": 64, "n_ctx_null": 1, "fingerprint": config["fingerprint"]}
    assert start.generator_config(config | {"n_ctx_null": 0}, raw)["n_ctx_null"] == 1
    short = tensors["cls_emb.weight"][1:]
    for name, tensor, got in (("cls_emb.weight", short, r"\[8, 64\]"), ("sos", None, "none")):
        damaged = {key: value for key, value in (tensors | {name: tensor}).items() if value is not None}
        with pytest.raises(checkpoint.CheckpointError, match=rf"{name} must be \[.*64\], got {got}"):
            start.generator(task.model, "x", start.Weights(config, damaged))
    with pytest.raises(ValueError, match="condition must be that of the checkpoint, 'text', got 'class'"):
        generator.train(tmp_path / "no", replace(settings, start=str(tmp_path), condition="class"))


def test_positions_follow_registers_and_frames(old_generator):
    weights = start.read_generator(str(old_generator))
    before = start._config(weights.config)
    more = replace(before, frames=7, seq_len=7 * 4)
    index = start._positions(before, more)
    # register 1 of frames 0, 4 and 6; register 2 of frame 0; register 3, which is new but for its first position
    assert [index[i] for i in (7, 11, 13, 14, 21, 22)] == [5, 9, 9, 10, 15, None]


def test_a_generator_goes_on_with_factors(old, old_generator, tmp_path):
    settings = GeneratorSettings(
        steps=2, batch=2, clips=4, tokenizer="", tokens_per_frame=3, start=str(old_generator), lora=2, warmup=1
    )
    generator.train(tmp_path, settings)
    model = vft.Generator.from_pretrained(tmp_path)
    assert model.tokenizer == str(old) and model.config.depth == 1
    before = vft.Generator.from_pretrained(old_generator)
    assert torch.equal(model.pos_emb, before.pos_emb)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight)


def test_a_generator_goes_on_with_an_earlier_tokenizers_successor(old, old_generator, tmp_path):
    later = vft.Tokenizer.from_pretrained(old)
    torch.nn.init.normal_(later.encoder.head.weight, std=0.2)
    later.save(tmp_path / "later.safetensors")
    settings = GeneratorSettings(
        steps=1, batch=2, clips=4, tokenizer=str(tmp_path / "later.safetensors"), tokens_per_frame=3,
        start=str(old_generator), depth=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"those of a tokenizer of fingerprint .*; --force goes on all the same"):
        generator.train(tmp_path / "a", settings)
    generator.train(tmp_path / "b", replace(settings, force=True))
    model = vft.Generator.from_pretrained(tmp_path / "b")
    assert model.config.fingerprint == vft.Tokenizer.from_pretrained(tmp_path / "later.safetensors").fingerprint


def test_what_does_not_fit_is_named(old, old_generator, tmp_path):
    settings = GeneratorSettings(clips=4, start=str(old_generator), tokenizer="tiny", tokens_per_frame=3)
    with pytest.raises(ValueError, match="vocab must be that of the checkpoint, 64, got 64000"):
        generator.train(tmp_path / "a", settings)
    with pytest.raises(ValueError, match="lora must lie between 1 and 32, got 33"):
        tokenizer.train(tmp_path / "b", replace(SETTINGS, start=str(old), lora=33), config=SMALL)
    assert cli.main(["train", "tokenizer", "-o", str(tmp_path / "c"), "--lora", "4"]) == 2


def test_defaults_are_those_of_fine_tuning(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizer, "train", lambda folder, settings, **_: seen.append(settings))
    for words in ([], ["--from", "tiny"], ["--from=tiny", "--ema", "0.5"]):
        assert cli.main(["train", "tokenizer", "-o", str(tmp_path), *words]) == 0
    new, tuned, own = seen
    assert (new.steps, new.learning_rate, new.ema, new.start) == (8500, 2e-3, 0.998, "")
    assert (tuned.steps, tuned.learning_rate, tuned.ema, tuned.start) == (1000, 5e-4, 0.99, "tiny")
    assert own.ema == 0.5 and own.steps == 1000


def test_weights_that_change_have_no_fingerprint_of_a_file(old):
    model, other = vft.Tokenizer.from_pretrained(old), vft.Tokenizer.from_pretrained(old)
    first = model.fingerprint
    model.train().encoder.head.bias.data.add_(1)
    assert model.eval().fingerprint != first
    other.load_state_dict(model.state_dict())
    assert other.fingerprint == model.fingerprint


def test_a_few_steps_from_a_checkpoint_beat_as_many_from_nothing(tmp_path):
    """3 dB, see docs/models.md for more steps."""
    settings = TokenizerSettings(steps=3, batch=2, clips=6, warmup=1, learning_rate=5e-4)
    tokenizer.train(tmp_path / "from", replace(settings, start="tiny"), config=make_config(**TINY))
    tokenizer.train(tmp_path / "new", settings, config=make_config(**TINY))
    continued, new = (
        held_out(vft.Tokenizer.from_pretrained(tmp_path / run), 4, [8])["8"]["psnr"] for run in ("from", "new")
    )
    assert continued > new + 3, (continued, new)


def test_linear_codes_say_what_is_missing_most_important_first(monkeypatch):
    monkeypatch.setattr(teach, "STEPS", 60)
    torch.manual_seed(0)
    # 200 patches through 3 frames: 6 components of falling size, the first one known
    basis, sizes = torch.linalg.qr(torch.randn(12, 6)).Q, torch.tensor([4.0, 2.0, 1.5, 0.4, 0.3, 0.2])
    parts = torch.randn(200, 3, 6) * sizes
    x, known = parts @ basis.T, parts[..., :1] @ basis[:, :1].T
    codes = teach.fit(x, known, groups=2, levels=(8, 8))
    said, _ = flexkernels.fsq_quantize(codes(x).reshape(-1, 2), (8, 8), ids=False)
    said = said.view(200, 3, 4)

    def left(component, group):
        """The share of a component that no linear map of a group's codes has, of frames but the first."""
        y, z = parts[:, 1:, component].reshape(-1, 1), said[:, 1:, 2 * group : 2 * group + 2].reshape(-1, 2)
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        return ((y - z @ torch.linalg.lstsq(z, y).solution).square().sum() / y.square().sum()).item()

    assert max(left(1, 0), left(2, 0)) < 0.2 and min(left(1, 1), left(2, 1)) > 0.8
    assert max(left(3, 1), left(4, 1)) < 0.2 and left(0, 0) > 0.8
    # one frame alone, and fewer components than codes
    assert teach.fit(x[:, :1], known[:, :1], groups=7, levels=(4, 4))(x[:, :1]).shape == (200, 1, 14)


def test_the_encoder_learns_what_new_registers_say(tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "STEPS", 40)
    torch.manual_seed(0)
    tokenizer.train(
        tmp_path / "old", TokenizerSettings(steps=3, batch=2, clips=8, warmup=1),
        config=make_config(
            encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, head_dim=32, registers=4,
            codec="linear", levels=(4, 4, 4), grid=5, size=32,
        ),
    )  # fmt: skip
    settings = TokenizerSettings(
        steps=100, batch=8, clips=32, start=str(tmp_path / "old"), registers=10, teach=True, learning_rate=5e-3
    )
    tokenizer.train(tmp_path / "new", settings, config=SMALL)
    before, after = (vft.Tokenizer.from_pretrained(tmp_path / run) for run in ("old", "new"))
    begin, _ = start.tokenizer(str(tmp_path / "old"), registers=10)
    assert after.registers == 10 and torch.equal(after.decoder.head.weight, before.decoder.head.weight)
    # 2 heads a layer: no room for places
    assert len(after.decoder.blocks) == 1
    latents = before.codec.encode(procedural.batch(0, range(32), size=32))
    teacher = teach.Teacher(begin, before, latents)
    assert teacher.groups == 2
    wanted = teacher.values(list(latents))
    assert torch.equal(wanted[:, :, :4], before.encoder(list(latents)).view(32, 5, 4, 3))
    errors = (after.encoder(list(latents)).view(wanted.shape) - wanted).square().mean((0, 1, 3))
    assert errors[:4].max() < 0.05 and errors[4:].mean() < 0.5 * wanted[:, :, 4:].var((0, 1)).mean()
    with pytest.raises(ValueError, match="teach needs more registers than 4, got 4"):
        tokenizer.train(tmp_path / "a", replace(settings, registers=0), config=SMALL)
    for wrong, message in (
        ({"start": ""}, "teach needs a checkpoint"), ({"edges": 1.0}, "edges must not be given with teach"),
        ({"freeze_encoder": True}, "freeze_encoder must not"), ({"sizes": (16, 32)}, "sizes must be one with teach"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tokenizer.train(tmp_path / "b", replace(settings, **wrong), config=SMALL)


def test_blocks_that_hear_new_registers(monkeypatch):
    """What registers say arrives at the patches of their places, codes of each group and kind of frame apart, and the
    velocity is hardly worse than without the strange registers, with which it would be off by far."""
    monkeypatch.setattr(teach, "STEPS", 40)
    monkeypatch.setattr(tokenizer, "LESSONS", 24)
    task = tokenizer.TokenizerTask(TokenizerSettings(clips=24, start="tiny", registers=32 + KNOWN, teach=True), {})
    model, teacher, count = task.model.eval(), task.teacher, 8
    assert len(model.decoder.blocks) == 6 + 2 and task.start.new["decoder.blocks"] > 1_000_000
    latents = list(model.codec.encode(procedural.batch(5, range(count))))
    codes, _ = flexkernels.fsq_quantize(teacher.values(latents), model.config.levels, ids=False)
    noise = [torch.randn(x.shape) for x in latents]

    def error(decoder, codes):
        n = codes.shape[2]
        arguments = [n] * count, [0] * count, [False] * count
        with torch.no_grad():
            velocity = decoder(noise, torch.ones(1), codes.flatten(0, 2), *arguments, registers=n)
        each = [(n - x - v).square() for n, x, v in zip(noise, latents, velocity, strict=True)]
        return float((torch.stack(each) * model.codec.pixel_weight(5)).mean())

    heard, attention = [], model.decoder.blocks[1].attn
    handle = attention.proj.register_forward_pre_hook(lambda _, x: heard.append(x[0]))
    now = error(model.decoder, codes)
    handle.remove()
    packed = model.decoder.packing(latents, tuple(Member(i, model.registers) for i in range(count)), False, None)
    patches = torch.empty_like(packed.order)
    patches[packed.order] = torch.arange(len(patches))
    # later frames, whose codes the second head brings; [clips, frames, patches, groups, levels]
    arrived = heard[0][patches[: count * 5 * 16]].view(count, 5, 16, -1)[:, 1:, :, attention.head_dim :][..., : 2 * 6]
    said = torch.empty(count, 4, 16, 2, 6)
    said[:, :, teacher.order] = codes[:, 1:, KNOWN:].view(count, 4, 2, 16, 6).transpose(2, 3)
    for group in range(2):
        x, y = arrived.view(said.shape)[..., group, :].flatten(), said[..., group, :].flatten()
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.5
        z = said[..., group - 1, :].flatten()
        assert torch.corrcoef(torch.stack([x, z]))[0, 1].abs() < 0.2
    before = error(vft.Tokenizer.from_pretrained("tiny").decoder, codes[:, :, :KNOWN])
    strange, _ = start.tokenizer("tiny", 32 + KNOWN)
    assert before < now < 0.7 * error(strange.decoder, codes), (before, now, error(strange.decoder, codes))


def test_a_frozen_encoder_keeps_its_tokens(old, tmp_path):
    settings = replace(SETTINGS, start=str(old), learning_rate=0.01, freeze_encoder=True)
    tokenizer.train(tmp_path / "run", settings, config=SMALL)
    before, after = (vft.Tokenizer.from_pretrained(path) for path in (old, tmp_path / "run"))
    assert after.fingerprint == before.fingerprint
    assert all(torch.equal(p, q) for p, q in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True))
    assert not torch.equal(before.decoder.head.weight, after.decoder.head.weight)
    with pytest.raises(ValueError, match=r"freeze_encoder needs the checkpoint's sizes .* but encoder\.registers"):
        tokenizer.train(tmp_path / "more", replace(settings, registers=6), config=SMALL)

"""The tokenizer's public calls on a small random model with the embedded codec: shapes, long video, wrong input."""

from functools import cache

import pytest
import torch

import vft
from vft.config import make_config, parse_config


@cache
def small():
    torch.manual_seed(0)
    config = parse_config(
        make_config(
            encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=4, codec="linear", size=32
        )
    )
    model = vft.Tokenizer(config, "small").eval().requires_grad_(False)
    for layer in (model.decoder.head, model.decoder.head_modulation):
        torch.nn.init.normal_(layer.weight, std=0.1)
    for block in model.decoder.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    model.steps, model.guidance = 2, None
    return model


def clip(frames, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (2, 2), (16, 5), (17, 5), (18, 6), (33, 9), (34, 10)])
def test_any_length_keeps_its_frames(frames, latent_frames):
    model = small()
    tokens = model.encode(clip(frames), fps=12.5)
    assert tokens.ids.shape == (latent_frames, 4)
    assert (tokens.frames, tokens.fps, tokens.height, tokens.width, tokens.model) == (frames, 12.5, 32, 32, "small")
    video = model.decode(tokens)
    assert video.shape == (1, 3, frames, 32, 32)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1


def test_stream_gives_the_same_pieces():
    model = small()
    tokens = model.encode(clip(40))
    pieces = list(model.decode_stream(tokens, seed=3))
    assert [p.shape[1] for p in pieces] == [17, 16, 7]
    assert torch.equal(torch.cat(pieces, 1)[None], model.decode(tokens, seed=3))
    assert not torch.equal(pieces[0], next(model.decode_stream(tokens, seed=4)))


def test_later_chunks_drop_their_first_latent_frame():
    """Frames 16 to 32 are the second chunk of 33; its first latent frame is the first chunk's last frame once more."""
    model, frames = small(), clip(33)
    ids = model.encode(frames).ids
    assert torch.equal(ids[:5], model.encode(frames[:17]).ids)
    assert torch.equal(ids[5:], model.encode(frames[16:]).ids[1:])


def test_later_chunks_start_from_the_decoded_frame():
    """A later chunk is the sampler on (re-encoded frame, its ids before the chunk's) with that frame kept clean."""
    model = small()
    tokens = model.encode(clip(33))
    first, second = model.decode_stream(tokens, seed=1)
    seed = model.codec.encode(first[None, :, -1:])
    ids = torch.cat([model.encode_latents(seed)[0], tokens.ids[5:]])
    generator = torch.Generator().manual_seed(1)
    torch.randn(16, 5, 4, 4, generator=generator)
    noise = torch.randn(16, 5, 4, 4, generator=generator)
    latents = model.decode_latents([ids], noise=[noise], prefix=[seed[0]])
    want = model.codec.decode(latents[0][None]).clamp(-1, 1)[0, :, 1:]
    torch.testing.assert_close(second, want, rtol=0, atol=1e-5)


def test_encode_takes_paths_frames_and_floats(tmp_path):
    model, frames = small(), clip(5)
    ids = model.encode(frames).ids
    as_float = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(model.encode(as_float).ids, ids)
    both = model.encode(torch.cat([as_float, as_float.flip(-1)]))
    assert torch.equal(both[0].ids, ids)
    assert torch.equal(both[1].ids, model.encode(frames.flip(2)).ids)
    large = model.encode(clip(3, size=48))
    assert (large.height, large.width) == (48, 48)
    assert large.ids.shape == (2, 4)


def test_encoding_does_not_touch_the_global_generator():
    model = small()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    model.decode(model.encode(clip(17)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_size_does_not_change_tokens():
    model, frames = small(), clip(70)
    assert torch.equal(model.encode(frames, batch=1).ids, model.encode(frames, batch=4).ids)


def test_keep_changes_the_video_and_truncated_tokens_are_a_keep():
    model = small()
    tokens = model.encode(clip(17))
    full, one = model.decode(tokens), model.decode(tokens, keep=1)
    assert not torch.equal(full, one)
    assert torch.equal(model.decode(tokens.truncate(1)), one)
    assert torch.equal(model.decode(tokens, keep=0), model.decode(tokens.truncate(2), keep=0))


def test_conditioning_frames_are_kept():
    model = small()
    tokens = model.encode(clip(17))
    frame = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(9))
    video = model.decode(tokens, conditioning=frame)
    through_codec = model.codec.decode(model.codec.encode(frame[None])).clamp(-1, 1)
    torch.testing.assert_close(video[:, :, :1], through_codec, rtol=0, atol=1e-5)


def test_progress_counts_every_step():
    model, seen = small(), []
    model.decode(model.encode(clip(33)), steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_backends_agree():
    import flexkernels

    if flexkernels.available_backends()["cpu"] is not None:
        pytest.skip(f"cpu: {flexkernels.available_backends()['cpu']}")
    model, results = small(), {}
    for name in ("reference", "cpu"):
        with flexkernels.backend(name):
            tokens = model.encode(clip(17))
            results[name] = tokens.ids, model.decode(tokens, guidance=vft.APG())
    assert torch.equal(results["reference"][0], results["cpu"][0])
    torch.testing.assert_close(results["reference"][1], results["cpu"][1], rtol=0, atol=1e-3)


def test_bfloat16_model():
    model = vft.Tokenizer(small().config, "half").eval().to(torch.bfloat16)
    model.steps = 2
    video = model.decode(model.encode(clip(17)), guidance=vft.CFG(2.0))
    assert video.dtype == torch.float32
    assert torch.isfinite(video).all()


LATENTS = torch.zeros(16, 5, 4, 4)
IDS = torch.zeros(5, 4, dtype=torch.int64)
WRONG = {
    "no sample": (lambda m: m.encode_latents([]), "latents must hold at least one"),
    "channels": (lambda m: m.encode_latents([LATENTS[:3]]), r"latents must be \[16, T, H, W\]"),
    "odd side": (lambda m: m.encode_latents([LATENTS[..., :3]]), "multiples of"),
    "too long": (lambda m: m.encode_latents([torch.zeros(16, 9, 4, 4)]), "at most 8 frames"),
    "too wide": (lambda m: m.encode_latents([torch.zeros(16, 1, 4, 18)]), "positional table covers"),
    "NaN latents": (lambda m: m.encode_latents([LATENTS / 0]), "must be finite"),
    "NaN video": (lambda m: m.encode(torch.full((1, 3, 1, 32, 32), float("nan"))), "video must be finite"),
    "no frames": (lambda m: m.encode(clip(0)), "frame"),
    "video shape": (lambda m: m.encode(torch.zeros(3, 5, 32, 32)), r"\[B, 3, T, H, W\]"),
    "video type": (lambda m: m.encode(None), "video must be a path"),
    "id range": (lambda m: m.velocity([LATENTS], 0.5, [IDS + 64000]), r"ids must lie in 0\.\.63999"),
    "id shape": (lambda m: m.velocity([LATENTS], 0.5, [IDS[:3]]), r"ids must be int \[5"),
    "id count": (lambda m: m.velocity([LATENTS], 0.5, [IDS, IDS]), "one tensor a sample"),
    "keep high": (lambda m: m.velocity([LATENTS], 0.5, [IDS], keep=1000), r"keep must lie in 0\.\.4, got 1000"),
    "keep low": (lambda m: m.velocity([LATENTS], 0.5, [IDS], keep=-1), "keep must lie in"),
    "keep count": (lambda m: m.velocity([LATENTS], 0.5, [IDS], keep=[1, 2]), "keep must be one int"),
    "time": (lambda m: m.velocity([LATENTS], 1.5, [IDS]), "t must be between 0 and 1"),
    "prefix": (lambda m: m.velocity([LATENTS], 0.5, [IDS], prefix_frames=6), "prefix_frames must lie in"),
    "prefix size": (lambda m: m.decode_latents([IDS], noise=[LATENTS], prefix=[LATENTS[:, :1, :2]]), "must fit into"),
    "steps": (lambda m: m.decode_latents([IDS], noise=[LATENTS], steps=0), "steps must be an int >= 1"),
    "solver": (lambda m: m.decode_latents([IDS], noise=[LATENTS], solver="rk9"), "solver must be one of euler"),
    "compat": (lambda m: m.decode_latents([IDS], noise=[LATENTS], compat=["x"]), "compat must be among"),
    "mode": (lambda m: m.decode_latents([IDS], noise=[LATENTS], prefix_mode="x"), "prefix_mode must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(small())


def test_tokens_of_another_codebook():
    tokens = vft.VideoTokens(IDS, 25.0, 17, 32, 32, "other", (8, 8))
    with pytest.raises(ValueError, match="tokens must have levels"):
        small().decode(tokens)


def test_guidance_needs_a_null_token():
    raw = make_config(encoder_width=64, decoder_width=64, registers=4, codec="linear", size=32)
    raw["video_flex_tok"]["decoder"]["module_dict"].pop("dec_latent_dropout")
    model = vft.Tokenizer(parse_config(raw)).eval()
    with pytest.raises(ValueError, match="needs a null token"):
        model.decode_latents([IDS], noise=[LATENTS], guidance=vft.CFG(2.0))
    assert model.decode_latents([IDS], noise=[LATENTS], guidance=None, steps=1)[0].shape == LATENTS.shape

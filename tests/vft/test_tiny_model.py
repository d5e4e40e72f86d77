"""The embedded model: it is there, small, and more tokens look better."""

import copy
import pickle

import pytest
import torch

import vft
from vft import words
from vft.checkpoint import ASSETS
from vft.demo import CLIP
from vft.evaluate import held_out, one_video
from vft.generator import time_first
from vft.metrics import psnr
from vft.train import named, procedural

KEEPS = [1, 4, 16, 32, 128]


@pytest.fixture(scope="module")
def tiny():
    return vft.Tokenizer.from_pretrained("tiny")


def test_size(tiny):
    assert sum(p.numel() for p in tiny.parameters()) <= 8_000_000
    assert (ASSETS / "tiny.safetensors").stat().st_size < 16_000_000
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 30_000_000
    assert (tiny.name, tiny.size, tiny.registers, tiny.config.levels) == ("tiny", 64, 128, (8, 8, 8, 5, 5, 5))


def test_more_tokens_are_better_on_held_out_clips(tiny):
    quality = held_out(tiny, 48, KEEPS)
    steps = [quality[str(k)]["psnr"] for k in KEEPS]
    assert steps == sorted(steps), steps
    assert steps[-1] > 20.5 and steps[-1] > steps[0] + 4, steps


def test_more_tokens_are_better_on_a_real_clip(tiny):
    quality = one_video(tiny, CLIP, KEEPS)
    steps = [quality[str(k)]["psnr"] for k in KEEPS]
    assert steps == sorted(steps), steps


def test_tokens_say_something_about_the_clip(tiny):
    """Decoding with another clip's tokens is worse than with the clip's own, by far."""
    clips = procedural.batch(3_000_000, range(8))
    ids = tiny.encode_latents(tiny.codec.encode(clips))
    own = psnr(tiny.codec.decode(torch.stack(tiny.decode_latents(ids))), clips).mean()
    other = psnr(tiny.codec.decode(torch.stack(tiny.decode_latents(ids[1:] + ids[:1]))), clips).mean()
    assert own > other + 3, (float(own), float(other))


def test_the_generator_is_small_and_knows_its_classes():
    """On the ids of clips that it was not trained on, the class is the likeliest one most of the time."""
    generator, tokenizer = vft.Generator.from_pretrained("tiny"), vft.Tokenizer.from_pretrained("tiny")
    assert (ASSETS / "tiny_generator.safetensors").stat().st_size < 10_000_000
    assert generator.classes == procedural.FAMILIES and generator.tokenizer == "tiny"
    count = 16
    ids = tokenizer.encode_latents(tokenizer.codec.encode(procedural.batch(3_000_000, range(count))))
    flat = torch.stack([time_first(i[:, :16]) for i in ids])
    labels = torch.tensor([procedural.label(3_000_000, i) for i in range(count)])

    def loss(family: int) -> torch.Tensor:
        logits = generator.logits(flat, class_id=family).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, flat, reduction="none").mean(1)

    losses = torch.stack([loss(family) for family in range(len(procedural.FAMILIES))])
    # a uniform guess over 64,000 ids has 11.07
    assert losses[labels, torch.arange(count)].mean() < 6.3
    assert (losses.argmin(0) == labels).float().mean() >= 0.5


def test_the_generator_of_captions_knows_its_words():
    """On the ids of clips that it was not trained on, their own captions are likelier than those of others."""
    generator, tokenizer = vft.Generator.from_pretrained("tiny_text"), vft.Tokenizer.from_pretrained("tiny")
    assert (ASSETS / "tiny_text_generator.safetensors").stat().st_size < 5_000_000
    assert generator.config.ctx_dim == words.WIDTH and generator.tokenizer == "tiny"
    assert generator.config.fingerprint == tokenizer.fingerprint
    seed, count = 3_000_000, 8
    clips = procedural.together(lambda i: named.clip(seed, i), range(count), 64, 17)
    ids = tokenizer.encode_latents(tokenizer.codec.encode(clips))
    flat = torch.stack([time_first(i[:, :16]) for i in ids])

    def loss(caption: str) -> torch.Tensor:
        emb, mask = words.embed([caption])
        logits = generator.logits(flat, text_emb=emb, text_mask=mask).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, flat, reduction="none").mean(1)

    losses = torch.stack([loss(named.caption(seed, i)) for i in range(count)])
    assert losses.diagonal().mean() < 5.5
    assert (losses.argmin(0) == torch.arange(count)).float().mean() >= 0.75


def test_models_are_copied_and_pickled():
    tokenizer, generator = vft.Tokenizer.from_pretrained("tiny"), vft.Generator.from_pretrained("tiny")
    clip = procedural.batch(3_000_000, [0])
    tokens = tokenizer.encode(clip)
    for again in (copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        twin = again(tokenizer)
        assert torch.equal(twin.encode(clip).ids, tokens.ids) and twin.fingerprint == tokenizer.fingerprint
    other = pickle.loads(pickle.dumps(generator))
    ids = [model.generate("zoom", frames=2, tokens_per_frame=2, temperature=0) for model in (generator, other)]
    assert torch.equal(*ids)

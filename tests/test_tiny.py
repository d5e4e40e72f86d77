"""The embedded model: it is there, small, and more tokens look better."""

import pytest
import torch

import vft
from vft.checkpoint import ASSETS
from vft.demo import CLIP
from vft.evaluate import held_out, one_video, psnr
from vft.generator import time_first
from vft.train import procedural

KEEPS = [1, 4, 16, 32]


@pytest.fixture(scope="module")
def tiny():
    return vft.Tokenizer.from_pretrained("tiny")


def test_size(tiny):
    assert sum(p.numel() for p in tiny.parameters()) <= 8_000_000
    assert (ASSETS / "tiny.safetensors").stat().st_size < 12_000_000
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 25_000_000
    assert (tiny.name, tiny.size, tiny.registers, tiny.config.levels) == ("tiny", 64, 32, (8, 8, 8, 5, 5, 5))


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


def test_the_generator_is_small_and_follows_its_class():
    """Likelier than with any other class on average, on the ids of clips that it was not trained on."""
    generator, tokenizer = vft.Generator.from_pretrained("tiny"), vft.Tokenizer.from_pretrained("tiny")
    assert (ASSETS / "tiny_generator.safetensors").stat().st_size < 10_000_000
    assert generator.classes == procedural.FAMILIES and generator.tokenizer == "tiny"
    count = 24
    ids = tokenizer.encode_latents(tokenizer.codec.encode(procedural.batch(3_000_000, range(count))))
    flat = torch.stack([time_first(i[:, :16]) for i in ids])
    labels = torch.tensor([procedural.label(3_000_000, i) for i in range(count)])

    def loss(classes) -> torch.Tensor:
        logits = generator.logits(flat, class_id=classes.tolist())
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat.flatten())

    own = loss(labels)
    # a uniform guess over 64,000 ids has 11.07
    assert own < 8
    assert own < min(loss((labels + shift) % len(procedural.FAMILIES)) for shift in (1, 4))

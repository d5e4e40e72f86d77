"""Clips that words name: they show what their caption says; a generator learns from captions and is asked with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from train_worker import SMALL

import vft
from vft import cli, words
from vft.config import parse_config
from vft.text import encode_captions
from vft.tokens import VideoTokens
from vft.train import generator, named
from vft.train.data import NAMED
from vft.train.generator import GeneratorSettings


def clips_of(word, count, seed=7):
    """Clips whose caption has the word, float [T, size, size, 3] in 0..1, and their facts."""
    found = [i for i in range(400) if word in named.caption(seed, i)][:count]
    return [(named.clip(seed, i).float() / 255, named.facts(seed, i)) for i in found]


def thing(clip, colour):
    """Where a clip shows a colour of the table, bool [T, size, size]."""
    wanted = torch.tensor(named.RGB[colour])
    hue = clip - clip.mean(-1, keepdim=True)
    wanted = wanted - wanted.mean()
    return ((hue * wanted).sum(-1) > 0.6 * wanted.square().sum()).numpy()


def middle(mask):
    """Rows and columns of the mask's centre of mass, [T, 2]."""
    return np.stack([np.argwhere(frame).mean(0) for frame in mask])


@pytest.mark.parametrize(("heading", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_things_move_where_their_caption_says(heading, axis, sign):
    seen = 0
    for clip, (colour, _, _) in clips_of(f"moving {heading}", 12):
        # hueless ones are hard to tell from their background
        if colour not in ("red", "green", "blue", "yellow"):
            continue
        way = middle(thing(clip, colour))
        way = way[-1] - way[0]
        assert way[axis] * sign > 8 and abs(way[1 - axis]) < 4, (colour, way)
        seen += 1
    assert seen >= 3


def test_things_grow_shrink_and_rest():
    for motion, low, high in (("growing", 1.5, 9), ("shrinking", 0.1, 0.7), ("resting", 0.9, 1.1)):
        ratios = []
        for clip, (colour, _, _) in clips_of(motion, 12):
            if colour in ("red", "green", "blue", "yellow"):
                areas = thing(clip, colour).sum((1, 2))
                ratios.append(areas[-1] / areas[0])
        assert len(ratios) >= 3 and low < min(ratios) and max(ratios) < high, (motion, ratios)


def test_a_clip_follows_from_seed_and_index():
    assert torch.equal(named.clip(1, 2), named.clip(1, 2)) and not torch.equal(named.clip(1, 2), named.clip(1, 3))
    assert named.clip(1, 2, 16, 5).shape == (5, 16, 16, 3) and named.clip(1, 2).dtype == torch.uint8
    captions = {named.caption(1, i) for i in range(300)}
    assert {word for caption in captions for word in caption.split()} == set(words.WORDS)
    with pytest.raises(ValueError, match="size and frames must be >= 1"):
        named.clip(1, 2, 0)


def test_words_are_orthogonal_and_unknown_ones_are_named():
    emb, mask = words.embed(["A red disc, moving left!", "blue"])
    assert emb.shape == (2, 4, words.WIDTH) and mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert not emb[1, 1:].any()
    torch.testing.assert_close(emb[0] @ emb[0].T, words.WIDTH * torch.eye(4))
    # of what published models see: mean 0, variance 1
    assert emb[0].mean(1).abs().max() == 0 and (emb[0].std(1, correction=0) == 1).all()
    with pytest.raises(ValueError, match=r"must be made of the words red, .* got 'pink'"):
        words.embed(["pink disc"])
    with pytest.raises(ValueError, match="at least one word, got 'the'"):
        words.embed(["the"])
    assert torch.equal(encode_captions(["blue"], "words")[0], words.embed(["blue"])[0])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("named") / "small.safetensors"
    torch.manual_seed(0)
    model = vft.Tokenizer(parse_config(SMALL), "small")
    with torch.no_grad():
        # as they start, all registers have one id
        for weight in (model.encoder.registers, model.encoder.head.weight):
            weight.mul_(10)
    model.save(path)
    return str(path)


def test_a_generator_of_captions_is_trained_and_asked(tmp_path, tokenizer, capsys):
    settings = GeneratorSettings(
        steps=3, batch=3, clips=6, warmup=1, tokenizer=tokenizer, depth=1, tokens_per_frame=2, data=NAMED,
        condition="text",
    )  # fmt: skip
    generator.train(tmp_path / "run", settings)
    model = str(tmp_path / "run" / "model.safetensors")
    with safe_open(model, "pt") as file:
        # the names of published text models
        assert {"ctx_in.weight", "ctx_null"} <= set(file.keys())
        assert file.metadata()["cond"] == '"text"' and file.metadata()["ctx_dim"] == str(words.WIDTH)
    argv = ["generate", "--model", model, "--tokens-only", "--temperature", "0", "-o"]
    output = str(tmp_path / "red.vft")
    assert cli.main([*argv, output, "--text", "red disc moving left"]) == 0
    gen = vft.Generator.from_pretrained(model)
    emb, mask = words.embed(["red disc moving left"])
    wanted = gen.generate(text_emb=emb, text_mask=mask, n=1, frames=5, tokens_per_frame=2, temperature=0)
    assert torch.equal(VideoTokens.load(output).ids, wanted[0])
    assert cli.main([*argv, str(tmp_path / "b.vft"), "--text", "pink disc"]) == 2
    assert "got 'pink'" in capsys.readouterr().err
    # the captions that a run learns from are those of its clips
    task = generator.GeneratorTask(settings, vft.Tokenizer.from_pretrained(tokenizer))
    assert torch.equal(task.data.captions([4])[0], words.embed([named.caption(0, 4)])[0][0])
    assert torch.equal(task._conditions([4])[0], task.data.captions([4])[0])


def test_motions_are_the_classes_of_named_clips(tmp_path, tokenizer):
    settings = GeneratorSettings(
        steps=1, batch=2, clips=3, warmup=1, tokenizer=tokenizer, depth=1, tokens_per_frame=2, data=NAMED
    )
    generator.train(tmp_path / "run", settings)
    assert vft.Generator.from_pretrained(tmp_path / "run").classes == words.MOTIONS
    with pytest.raises(ValueError, match=r"data to be a folder of \.vft files \(text: or"):
        generator.train(tmp_path / "no", replace(settings, data="procedural", condition="text"))

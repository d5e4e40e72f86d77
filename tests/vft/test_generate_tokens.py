"""From a generator to a video in Python, and what a generator does by default."""

import warnings

import pytest

import vft
from vft import cli
from vft.fingerprint import TokensWarning


@pytest.fixture(scope="module")
def generator():
    return vft.Generator.from_pretrained("tiny")


def test_generated_tokens_are_decoded(generator, tmp_path):
    tokenizer = vft.Tokenizer.from_pretrained("tiny")
    made = generator.generate_tokens(tokenizer, "zoom", n=2, frames=2, seed=3, fps=12.0)
    ids = generator.generate("zoom", n=2, frames=2, seed=3)
    assert [tokens.ids.tolist() for tokens in made] == ids.tolist()
    assert (made[0].fps, made[0].frames, made[0].model) == (12.0, 5, "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.decode(made[0], steps=1).shape == (1, 3, 5, 64, 64)
    made[1].save(tmp_path / "a.vft")
    assert vft.VideoTokens.load(tmp_path / "a.vft").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("frames", "tokens"), [(1, 24), (5, 24), (8, 15)])
def test_defaults_stay_inside_training(generator, frames, tokens):
    assert generator.config.trained_frames == 5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert next(generator.stream("zoom", frames=frames)).shape[1] == frames
        *_, ids = generator.stream("zoom", frames=frames)
    assert ids.shape == (1, frames, tokens)
    said = [str(w.message) for w in caught if w.category is TokensWarning]
    assert said == ["frames 8 are more than the 5 that the generator was trained on: 15 tokens a frame"] * (
        2 * (frames > 5)
    )


def test_info_of_the_embedded_models(capsys):
    assert cli.main(["info", "tiny"]) == 0
    tokenizer, generator = capsys.readouterr().out.split("\n\n")
    assert "registers" in tokenizer and "MiB of weights" in tokenizer and "stored" not in tokenizer
    for words in (
        "makes",
        "5 latent frames of 24 tokens; at most 120 tokens",
        "zoom, ",
        " stored, 36015104 effective",
        "MiB",
    ):
        assert words in generator, generator

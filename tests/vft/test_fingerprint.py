"""Tokens know the weights that made them, and only these decode them."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from small_tokenizer import small

import vft
from vft import batch, cli
from vft.config import make_config, parse_config
from vft.demo import CLIP
from vft.tokens import VideoTokens
from vft.train.data import TokenFiles

CLIP_OF_NOISE = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "small.safetensors"
    small().save(path)
    return path


def moved(path, name):
    """The saved tokenizer with one weight of the given name changed, saved beside."""
    model = vft.Tokenizer.from_pretrained(path)
    dict(model.named_parameters())[name].flatten()[0].add_(0.01)
    other = path.with_name("other.safetensors")
    model.save(other)
    return other


def test_what_decides_the_ids_decides_the_fingerprint(saved):
    first = vft.Tokenizer.from_pretrained(saved)
    assert first.fingerprint == small().fingerprint
    assert vft.Tokenizer.from_pretrained(saved, dtype=torch.bfloat16).fingerprint == first.fingerprint
    for name in ("encoder.head.bias", "encoder.registers", "encoder.blocks.0.attn.wq.weight"):
        assert vft.Tokenizer.from_pretrained(moved(saved, name)).fingerprint != first.fingerprint
    # a decoder that was trained further
    assert vft.Tokenizer.from_pretrained(moved(saved, "decoder.head.bias")).fingerprint == first.fingerprint


def test_the_config_decides_too():
    def of(**changes):
        torch.manual_seed(0)
        config = {"encoder_width": 64, "encoder_depth": 1, "decoder_width": 64, "decoder_depth": 1, "registers": 4}
        return vft.Tokenizer(
            parse_config(make_config(**config | {"codec": "linear", "size": 32} | changes))
        ).fingerprint

    assert of() == of()
    assert len({of(), of(size=64), of(levels=(8, 8, 8, 5, 5, 6)), of(codec="vidtok_kl_causal_488_16chn")}) == 4


def test_prepared_weights_and_storage(saved, tmp_path):
    model = vft.Tokenizer.from_pretrained(saved)
    plain = small()
    before = plain.fingerprint
    assert plain.prepare().fingerprint == before == model.fingerprint
    model.save(tmp_path / "half.safetensors", torch.float16)
    half = vft.Tokenizer.from_pretrained(tmp_path / "half.safetensors")
    assert half.fingerprint != before
    half.save(tmp_path / "again.safetensors")
    assert vft.Tokenizer.from_pretrained(tmp_path / "again.safetensors").fingerprint == half.fingerprint


def test_only_the_same_weights_decode(saved):
    tokens = vft.Tokenizer.from_pretrained(saved).encode(CLIP_OF_NOISE)
    tokens = VideoTokens.from_bytes(tokens.to_bytes())
    assert tokens.fingerprint == vft.Tokenizer.from_pretrained(saved).fingerprint
    other = vft.Tokenizer.from_pretrained(moved(saved, "encoder.head.bias"))
    settings = {"steps": 1, "guidance": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vft.Tokenizer.from_pretrained(saved).decode(tokens, **settings)
        names = rf"'other' \(fingerprint {other.fingerprint}\), got those of 'small' \({tokens.fingerprint}\)"
        with pytest.raises(ValueError, match=names):
            other.decode(tokens, **settings)
        other.decode(tokens, force=True, **settings)
        other.decode(tokens.truncate(2), force=True, **settings)
    with pytest.raises(ValueError, match="of the model that decodes"):
        other.decode(tokens.truncate(2), **settings)


def test_old_files_decode_with_a_warning(saved):
    model = vft.Tokenizer.from_pretrained(saved)
    tokens = model.encode(CLIP_OF_NOISE)
    old = VideoTokens(tokens.ids, 25.0, 5, 32, 32, "small", tokens.levels)
    assert b"fingerprint" not in old.to_bytes() and old.fingerprint == ""
    with pytest.warns(UserWarning, match="do not say which weights made them, only the name 'small'"):
        model.decode(old, steps=1, guidance=None)


@pytest.mark.parametrize("value", ["x", "0" * 15, "A" * 16, None, 3])
def test_bad_fingerprints(value):
    with pytest.raises(ValueError, match="fingerprint must be 16 hexadecimal digits"):
        VideoTokens(torch.zeros(1, 1, dtype=torch.int64), 25.0, 1, 32, 32, "small", (8, 8), 17, value)


def test_commands(saved, tmp_path, capsys):
    tokens, other = tmp_path / "a.vft", moved(saved, "encoder.head.bias")
    assert cli.main(["encode", str(CLIP), "-o", str(tokens), "--model", str(saved)]) == 0
    decode = [
        "decode",
        str(tokens),
        "-o",
        str(tmp_path / "a.mp4"),
        "--steps",
        "1",
        "--guidance",
        "none",
        "--model",
        str(other),
    ]
    assert cli.main(decode) == 2
    assert "force=True or --force" in capsys.readouterr().err
    assert cli.main([*decode, "--force"]) == 0
    capsys.readouterr()
    assert cli.main(["info", str(tokens)]) == 0
    made = VideoTokens.load(tokens)
    assert made.fingerprint in capsys.readouterr().out
    VideoTokens(made.ids, made.fps, made.frames, made.height, made.width, made.model, made.levels).save(tokens)
    assert cli.main(decode) == 0
    assert "vft: warning: these tokens do not say which weights made them" in capsys.readouterr().err


def test_a_folder_is_encoded_anew_by_other_weights(saved, tmp_path):
    source, out = tmp_path / "videos", tmp_path / "tokens"
    source.mkdir()
    (source / "a.mp4").write_bytes(CLIP.read_bytes())
    model = vft.Tokenizer.from_pretrained(saved)
    assert batch.encode_folder(model, source, out).encoded == 1
    line = json.loads((out / "manifest.0.jsonl").read_text())
    assert line["fingerprint"] == model.fingerprint
    assert batch.encode_folder(model, source, out).skipped == 1
    other = vft.Tokenizer.from_pretrained(moved(saved, "encoder.head.bias"))
    other.name = model.name
    assert batch.encode_folder(other, source, out).encoded == 1
    # lines of earlier versions
    line = json.loads((out / "manifest.0.jsonl").read_text())
    (out / "manifest.0.jsonl").write_text(json.dumps({k: v for k, v in line.items() if k != "fingerprint"}) + "\n")
    assert batch.encode_folder(model, source, out).skipped == 1


def test_generated_tokens_know_the_tokenizer(saved):
    model = vft.Tokenizer.from_pretrained(saved)
    raw = {"depth": 1, "vocab": 64_000, "seq_len": 8, "cond": "class", "n_classes": 2}
    options = {"fps": 8.0, "n": 1, "frames": 2, "tokens_per_frame": 2}
    for stated in ({}, {"fingerprint": model.fingerprint}):
        generator = vft.Generator(vft.config.parse_generator_config(raw | stated)).eval().requires_grad_(False)
        (tokens,) = generator.generate_tokens(model, 1, **options)
        assert tokens.fingerprint == model.fingerprint
    generator = vft.Generator(vft.config.parse_generator_config(raw | {"fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="of a tokenizer of fingerprint 0000000000000000, got 'small' of"):
        generator.generate_tokens(model, 1, **options)


def test_a_generator_is_not_trained_on_tokens_of_other_weights(saved, tmp_path):
    model, folder = vft.Tokenizer.from_pretrained(saved), tmp_path / "tokens"
    folder.mkdir()
    tokens = model.encode(CLIP_OF_NOISE)
    tokens.save(folder / "a.vft")
    replace(tokens, fingerprint="").save(folder / "old.vft")
    replace(tokens, fingerprint="0" * 16).save(folder / "other.vft")
    files = TokenFiles(str(folder), "small", 4, fingerprint=model.fingerprint)
    assert len(files.found) == 2
    (reason,) = files.skipped.values()
    assert f"must hold tokens of 'small' with the fingerprint {model.fingerprint}, got 0000000000000000" in reason


def test_the_codec_of_a_checkpoint_decides_too():
    def of(**state):
        model = small()
        model._codec_state = {name.replace("_", "."): torch.full((3,), value) for name, value in state.items()}
        return model.fingerprint

    assert of(vidtok_encoder_x=1.0) not in (of(vidtok_encoder_x=2.0), of(), small().fingerprint)
    # the decoder of the codec decides no id
    assert of(vidtok_encoder_x=1.0, vidtok_decoder_x=1.0) == of(vidtok_encoder_x=1.0, vidtok_decoder_x=2.0)


def test_the_embedded_generator_knows_its_tokenizer():
    generator, tokenizer = (kind.from_pretrained("tiny") for kind in (vft.Generator, vft.Tokenizer))
    assert generator.config.fingerprint == tokenizer.fingerprint

"""Encoder and Decoder: what a row becomes, in any batch, in another process, and beside a bad one."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from small_tokenizer import small

from vft import VideoTokens, video
from vft.data import Decoder, Encoder
from vft.data.rows import rows_of, tokens_of

FRAMES = {"a.mp4": 17, "b.mp4": 3, "c.mp4": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    small().save(path)
    return str(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, frames in FRAMES.items():
        pixels = torch.randint(
            256, (frames, 5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(frames)
        )
        video.write_video(folder / name, video.resize(pixels, 40, 40), 10)
    (folder / "bad.mp4").write_bytes(b"nothing to see")
    return folder


@pytest.fixture(scope="module")
def encoded(model, clips):
    return Encoder(model)([{"path": str(clips / name)} for name in FRAMES])


def test_rows_hold_what_encode_gives(model, clips, encoded):
    tokenizer = Encoder(model).model.load()
    for row, (name, frames) in zip(encoded, FRAMES.items(), strict=True):
        want = tokenizer.encode(clips / name)
        assert row["error"] is None and row["key"] == row["path"] == str(clips / name)
        assert row["ids"].dtype == np.uint16 and row["ids"].shape == (want.latent_frames, 4)
        # packed with other chunks: a value between two levels may round otherwise
        assert (torch.from_numpy(row["ids"].astype(int)) == want.ids).float().mean() > 0.99
        assert (row["frames"], row["fps"], row["height"], row["width"]) == (frames, 10, 40, 40)
        data = tokens_of(row).to_bytes()
        assert row["checksum"] == hashlib.sha256(data).hexdigest() and VideoTokens.from_bytes(data).model == "small"


def test_bad_rows_do_not_stop_a_batch(model, clips, encoded):
    rows = [
        {"path": str(clips / "bad.mp4"), "label": 0},
        {"path": str(clips / "a.mp4"), "label": 1},
        {"key": "nothing", "label": 2},
        {"path": str(clips / "gone.mp4"), "label": 3},
        {"bytes": (clips / "b.mp4").read_bytes(), "key": "b", "label": 4},
        {"bytes": b"\0" * 100, "label": 5},
    ]
    made = Encoder(model, keep=2)(rows)
    assert [row["label"] for row in made] == list(range(6)) and not any("bytes" in row for row in made)
    assert [row["error"] is None for row in made] == [False, True, False, False, True, False]
    assert made[0]["error"].startswith("not a video") and made[3]["error"] == "no such file"
    assert made[2]["error"] == "row must have path, the name of a file, or bytes, its content"
    assert made[5]["key"] == hashlib.sha256(b"\0" * 100).hexdigest() and "/tmp" not in made[5]["error"]
    assert made[0]["ids"].shape == (0, 2) and made[4]["ids"].shape == (2, 2)
    assert np.array_equal(made[4]["ids"], encoded[1]["ids"][:, :2])


def test_columns_in_columns_out(model, clips, encoded):
    paths = [str(clips / name) for name in FRAMES]
    made = Encoder(model)({"path": np.array(paths, object), "n": np.arange(3)})
    assert made["frames"].tolist() == list(FRAMES.values()) and made["n"].tolist() == [0, 1, 2]
    assert all(np.array_equal(a, row["ids"]) for a, row in zip(made["ids"], encoded, strict=True))
    with pytest.raises(ValueError, match="columns of one length"):
        rows_of({"a": [1], "b": []})
    with pytest.raises(TypeError, match="dict of columns or a list of dicts, got str"):
        rows_of("rows")


def test_a_pickled_encoder_is_small_and_gives_the_same(model, clips, encoded):
    encoder = Encoder(model, packed=2)
    encoder([{"path": str(clips / "b.mp4")}])
    sent = pickle.dumps(encoder)
    assert len(sent) < 1000
    (row,) = pickle.loads(sent)([{"path": str(clips / "a.mp4")}])
    assert np.array_equal(row["ids"], encoded[0]["ids"]) and row["fingerprint"] == encoded[0]["fingerprint"]


def test_fingerprint_is_of_the_weights(encoded):
    tokenizer = small()
    mark = tokenizer.fingerprint
    tokenizer.encode(torch.zeros(1, 3, 5, 32, 32))
    assert mark == tokenizer.fingerprint == small().fingerprint
    tokenizer.encoder.state_dict()[next(iter(tokenizer.encoder.state_dict()))].flatten()[0] += 1
    assert tokenizer.fingerprint != mark


def test_decoder_gives_what_decode_gives(model, encoded):
    decoder = Decoder(model, steps=2, packed=2, seed=3)
    tokenizer = decoder.model.load()
    made = decoder(encoded)
    for row in made:
        want = video.to_uint8(tokenizer.decode(tokens_of(row), steps=2, seed=3)).numpy()
        assert row["error"] is None and row["video"].shape == want.shape
        assert np.abs(row["video"].astype(int) - want.astype(int)).max() <= 1
    coarse = pickle.loads(pickle.dumps(Decoder(model, steps=2, keep=1)))(encoded[:1])[0]["video"]
    assert coarse.shape == made[0]["video"].shape and not np.array_equal(coarse, made[0]["video"])


def test_decoder_refuses_rows_of_another_model(model, encoded):
    rows = [
        encoded[0] | {"fingerprint": "0" * 16},
        encoded[0] | {"levels": np.array([16] * 4)},
        {"key": "a", "ids": encoded[0]["ids"]},
        encoded[0] | {"frames": 99},
        encoded[0] | {"error": "was bad before"},
        encoded[1],
    ]
    made = Decoder(model, steps=1)(rows)
    mark = encoded[0]["fingerprint"]
    assert mark in made[0]["error"] and f"got those of 'small' ({'0' * 16})" in made[0]["error"]
    assert made[1]["error"].startswith("ids must be of levels")
    assert made[2]["error"].startswith("row must have chunk, fps") and made[3]["error"].startswith("frames must be at")
    assert made[4]["error"] == "was bad before" and made[5]["error"] is None
    assert [row["video"].shape[0] for row in made] == [0, 0, 0, 0, 0, 3]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="packed must be at least 1, got 0"):
        Encoder(packed=0)
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype or its name, got 'int8'"):
        Encoder(dtype="int8")
    with pytest.raises(ValueError, match="keep must be between 1 and 4, got 5"):
        Encoder(small(), keep=5)([{"key": "a"}])
    with pytest.raises(TypeError, match="sampler must be steps, guidance, solver, shift or seed, got stepz"):
        Decoder(stepz=1)

import dataclasses
import json
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vft.tokens import MAGIC, TokensError, VideoTokens

LEVELS = (8, 8, 8, 5, 5, 5)


def make(rows=5, registers=7, **changes):
    generator = torch.Generator().manual_seed(rows * 100 + registers)
    ids = torch.randint(64000, (rows, registers), generator=generator)
    fields = {"fps": 23.976023976023978, "frames": 17, "height": 480, "width": 853, "model": "tiny", "levels": LEVELS}
    return VideoTokens(ids, **{**fields, **changes})


def same(a, b):
    fields = [f.name for f in dataclasses.fields(a) if f.name != "ids"]
    return torch.equal(a.ids, b.ids) and all(getattr(a, name) == getattr(b, name) for name in fields)


def body_start(data):
    return 12 + struct.unpack_from("<H", data, 6)[0]


def with_header(data, header):
    """The same body behind another header, with a right checksum."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<4sHH", MAGIC, 1, len(text))
    return start + struct.pack("<I", zlib.crc32(start + text)) + text + data[body_start(data) :]


def header_of(data):
    return json.loads(data[12 : body_start(data)])


def test_save_and_load(tmp_path):
    tokens = make(9, 256, frames=31, chunk=9, model="org/name@réf")
    tokens.save(tmp_path / "a.vft")
    back = VideoTokens.load(tmp_path / "a.vft")
    assert same(tokens, back) and back.ids.dtype == torch.int64
    assert [p.name for p in tmp_path.iterdir()] == ["a.vft"]


def test_layout_is_register_by_register():
    tokens = make(3, 2)
    data = tokens.to_bytes()
    assert data[:4] == b"VFT\x1a" and data[4:6] == b"\x01\x00"
    assert struct.unpack("<6H", data[body_start(data) :]) == tuple(tokens.ids.T.flatten().tolist())
    assert tokens.nbytes == 12


def test_largest_ids_survive():
    tokens = make(levels=(256, 256))
    tokens = dataclasses.replace(tokens, ids=torch.tensor([[0, 65535]], dtype=torch.int32))
    assert VideoTokens.from_bytes(tokens.to_bytes()).ids.tolist() == [[0, 65535]]


def test_every_prefix_is_a_coarser_video_or_an_error():
    tokens = make()
    data = tokens.to_bytes()
    start, row = body_start(data), 2 * tokens.latent_frames
    for cut in range(len(data) + 1):
        if cut < start + row:
            with pytest.raises(TokensError, match=r"^a\.vft: "):
                VideoTokens.from_bytes(data[:cut], "a.vft")
        else:
            assert same(VideoTokens.from_bytes(data[:cut]), tokens.truncate((cut - start) // row))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_prefixes_of_any_shape(rows, registers, data):
    tokens = make(rows, registers)
    content = tokens.to_bytes()
    cut = data.draw(st.integers(0, len(content)))
    complete = (cut - body_start(content)) // (2 * rows)
    if complete < 1:
        with pytest.raises(TokensError):
            VideoTokens.from_bytes(content[:cut])
    else:
        assert same(VideoTokens.from_bytes(content[:cut]), tokens.truncate(complete))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_never_raise_anything_else(data, signed):
    # half of the examples get past the magic
    with pytest.raises(TokensError):
        VideoTokens.from_bytes(MAGIC + data if signed else data)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["model", "shape", "fps", "frames", "height", "width", "levels", "chunk", "fingerprint", "other"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
        max_size=3,
    )
)
def test_hostile_headers_load_or_raise_tokens_error(changes):
    data = make().to_bytes()
    try:
        tokens = VideoTokens.from_bytes(with_header(data, {**header_of(data), **changes}))
    except TokensError:
        return
    assert "other" not in changes
    assert tokens.ids.numel() <= make().ids.numel()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_changed_byte_of_the_header_is_noticed(data):
    content = bytearray(make().to_bytes())
    position = data.draw(st.integers(0, body_start(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TokensError):
        VideoTokens.from_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5]}, r"shape must be \[T, N\]"),
        ({"shape": [0, 7]}, "shape must be between 1"),
        ({"shape": [10**9, 7]}, "first register is not complete"),
        ({"shape": [5, 6]}, "10 surplus bytes"),
        ({"fps": float("nan")}, "fps must be finite"),
        ({"fps": 10**400}, "too large"),
        ({"frames": 0}, "frames must be between 1"),
        ({"frames": True}, "frames must be an int"),
        ({"levels": [8, 8]}, r"ids must be in \[0, 64\)"),
        ({"levels": 8}, "levels must be a list"),
        ({"levels": []}, "levels must have at least one entry"),
        ({"model": 3}, "model must be a str"),
        ({"more": 3}, "must have the keys"),
    ],
)
def test_wrong_header_values(change, message):
    data = make().to_bytes()
    with pytest.raises(TokensError, match=message):
        VideoTokens.from_bytes(with_header(data, {**header_of(data), **change}))


def test_wrong_files(tmp_path):
    data = make().to_bytes()
    for content, message in [
        (b"", "empty"),
        (b"VF", "header is not complete"),
        (b"\x00\x00\x00\x18ftypmp42" * 9, "not a .vft file"),
        (data[:4] + b"\x02" + data[5:], "version must be 1, got 2"),
        (data[:40] + b"?" + data[41:], "checksum"),
        (data + b"\0", "1 surplus bytes"),
        (with_header(data, b"[" * 60000), ""),
        (with_header(data, b"\xff\xfe"), ""),
    ]:
        path = tmp_path / "wrong.vft"
        path.write_bytes(content)
        with pytest.raises(TokensError, match=rf"wrong\.vft: .*{message}"):
            VideoTokens.load(path)
    with pytest.raises(FileNotFoundError):
        VideoTokens.load(tmp_path / "missing.vft")


def test_truncate():
    tokens = make()
    assert torch.equal(tokens.truncate(3).ids, tokens.ids[:, :3])
    assert same(tokens.truncate(7), tokens)
    for k in (0, -1, 8, 1000):
        with pytest.raises(ValueError, match="k must be between 1"):
            tokens.truncate(k)
    with pytest.raises(TypeError, match="k must be an int"):
        tokens.truncate(2.0)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1]], TypeError, "torch.Tensor, got list"),
        (torch.ones(2, 2), TypeError, "int64 or int32, got torch.float32"),
        (torch.ones(2, 0, dtype=torch.int64), ValueError, r"got \[2, 0\]"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"got \[2\]"),
        (torch.tensor([[-1]]), ValueError, r"in \[0, 64000\), got -1"),
        (torch.tensor([[64000]]), ValueError, r"in \[0, 64000\), got 64000"),
    ],
)
def test_wrong_ids(ids, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(make(), ids=ids)


def test_what_cannot_be_saved_leaves_no_file(tmp_path):
    for tokens, message in [
        (make(levels=(256, 257)), "at most 65536 ids to be saved, got 65792"),
        (make(model="x" * 70000), "header must be at most 65535 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokens.save(tmp_path / "a.vft")
    assert not list(tmp_path.iterdir())

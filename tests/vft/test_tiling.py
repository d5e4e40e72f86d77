"""VidTok in bounded memory: tiles and pieces give the whole clip, and take the bytes that the plan says."""

import argparse
import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch

import vft
from vft import tiling
from vft.cli import main, parser_of
from vft.commands.options import load_tokenizer, return_memory, size_in_bytes
from vft.tiling import Plan
from vft.vidtok import VidTokCodec


@pytest.fixture(scope="module")
def exact():
    """In float64, where what a tile lacks cannot hide among roundings."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return VidTokCodec(width=2).double()


@pytest.fixture(scope="module")
def codec():
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return VidTokCodec(width=8)


# latents: more than a tile and all it sees to both sides, or less
@pytest.mark.parametrize(
    ("height", "width", "side", "latent_frames"), [(31, 1, 3, None), (1, 31, 3, 1), (7, 5, 4, 1), (3, 2, 9, None)]
)
def test_tiles_make_up_the_whole(exact, height, width, side, latent_frames):
    codec = copy.deepcopy(exact)
    video, latents = torch.rand(1, 3, 5, 8 * height, 8 * width) * 2 - 1, torch.randn(1, 16, 2, height, width)
    whole = codec.encode(video), codec.decode(latents)
    codec.tile, codec.latent_frames = side, latent_frames
    for got, want in zip((codec.encode(video), codec.decode(latents)), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * want.abs().amax())


def test_tiles_of_our_kernels_are_the_whole_up_to_rounding(codec):
    codec = copy.deepcopy(codec)
    video, latents = torch.rand(1, 3, 5, 72, 16) * 2 - 1, torch.randn(1, 16, 2, 9, 2)
    whole = codec.encode(video), codec.decode(latents)
    codec.tile = 5
    for got, want in zip((codec.encode(video), codec.decode(latents)), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_what_a_tile_sees(codec):
    """Of 60 x 60 latents, 20 to 40: 13 more to decode, 7.6 before and 8.5 behind to encode."""
    encoder, decoder = codec.vidtok.encoder.stages(), codec.vidtok.decoder.stages()
    middle = tiling.tiles(decoder, 60, 60, 20, up=True)[4]
    assert middle.source[2:] == (slice(7, 53),) * 2 and middle.target[2:] == (slice(160, 320),) * 2
    assert [rows.size for rows, _ in middle.windows] == [46, 68, 108, 180]
    middle = tiling.tiles(encoder, 60, 60, 20, up=False)[4]
    assert middle.source[2:] == (slice(160 - 73, 320 + 87),) * 2 and middle.target[2:] == (slice(20, 40),) * 2
    # a picture's border is a tile's
    assert tiling.tiles(decoder, 60, 60, 20, up=True)[0].source[2:] == (slice(0, 33),) * 2
    assert len(tiling.tiles(decoder, 60, 60, None, up=True)) == 1


def test_a_batch_under_a_limit_is_the_batch(codec):
    codec = copy.deepcopy(codec)
    video, latents = torch.rand(3, 3, 5, 16, 8) * 2 - 1, torch.randn(3, 16, 2, 2, 1)
    seed = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    whole = codec.encode(video, seed()), codec.decode(latents)
    codec.memory = 1 << 30
    for got, want in zip((codec.encode(video, seed()), codec.decode(latents)), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def peak(function) -> int:
    """Bytes that torch allocates in a call, at its peak."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    now = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize(("latent_frames", "side"), [(None, None), (1, None), (1, 4)])
def test_bytes_are_those_of_the_plan(codec, latent_frames, side):
    codec = copy.deepcopy(codec)
    codec.latent_frames, codec.tile = latent_frames, side
    video, latents = torch.rand(1, 3, 9, 64, 48) * 2 - 1, torch.randn(1, 16, 3, 8, 6)
    weight = codec.vidtok.encoder.conv_in.conv.weight
    for call, x, network, count in (
        (codec.encode, video, codec.vidtok.encoder, tiling.encode_bytes),
        (codec.decode, latents, codec.vidtok.decoder, tiling.decode_bytes),
    ):
        # weights are prepared
        call(x)
        planned, taken = count(network, 1, (3, 8, 6), weight, latent_frames, side), peak(lambda c=call, x=x: c(x))
        assert 0.95 * taken < planned < 1.1 * taken


def test_a_limit_chooses_pieces_then_tiles(codec):
    codec = copy.deepcopy(codec)
    codec.memory = 1 << 40
    free = codec.plan_decode(1, 5, 40, 30)
    assert (free.latent_frames, free.tile) == (None, None)
    codec.memory = free.bytes - 1
    pieces = codec.plan_decode(1, 5, 40, 30)
    assert 1 <= pieces.latent_frames < 5 and pieces.tile is None and pieces.bytes < free.bytes
    tiled = pieces
    while tiled.tile is None:
        codec.memory = tiled.bytes - 1
        tiled = codec.plan_decode(1, 5, 40, 30)
    codec.memory = tiled.bytes * 3 // 4
    tiled = codec.plan_decode(1, 5, 40, 30)
    assert tiled.latent_frames == 1 and 8 <= tiled.tile < 40 and tiled.bytes <= codec.memory
    # what the encoder's weights are prepared to stays beside the decoder's
    codec.memory = tiled.bytes
    codec.plan_encode(1, 1, 1, 1)
    assert codec.plan_decode(1, 5, 40, 30).tile < tiled.tile
    codec.memory = 1 << 20
    with pytest.raises(ValueError, match=r"memory must be at least \d+M for latents of 5 x 40 x 30, got 1M"):
        codec.decode(torch.zeros(1, 16, 5, 40, 30))


def test_a_smaller_limit_takes_fewer_bytes(codec):
    codec = copy.deepcopy(codec)
    latents = torch.randn(1, 16, 2, 12, 12)
    whole = codec.decode(latents)
    codec.memory = 1 << 40
    most = codec.plan_decode(1, 2, 12, 12).bytes
    codec.memory = most * 4 // 5
    plan = codec.plan_decode(1, 2, 12, 12)
    prepared = plan.bytes - tiling.decode_bytes(
        codec.vidtok.decoder, 1, (2, 12, 12), codec.vidtok.encoder.conv_in.conv.weight, plan.latent_frames, plan.tile
    )
    assert prepared + peak(lambda: codec.decode(latents)) <= codec.memory
    torch.testing.assert_close(codec.decode(latents), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["latent_frames", "tile", "memory"])
def test_settings_below_one_are_refused(codec, name):
    codec = copy.deepcopy(codec)
    setattr(codec, name, 0)
    with pytest.raises(ValueError, match=f"{name} must be None or at least 1, got 0"):
        codec.decode(torch.zeros(1, 16, 1, 1, 1))


def test_choose_names_what_is_needed():
    bytes_of = lambda frames, side: 100 * (frames or 4) * (side or 20)  # noqa: E731
    assert tiling.choose(8050, 50, (4, 20, 10), bytes_of) == Plan(None, None, 8050)
    assert tiling.choose(8049, 50, (4, 20, 10), bytes_of) == Plan(3, None, 6050)
    assert tiling.choose(1999, 50, (4, 20, 10), bytes_of) == Plan(1, 19, 1950)
    with pytest.raises(ValueError, match="memory must be at least 1M"):
        tiling.choose(849, 50, (4, 20, 10), bytes_of)


def test_sizes_are_read():
    assert [size_in_bytes(text) for text in ("4G", "1.5g", "800M", "64k")] == [4 << 30, 3 << 29, 800 << 20, 64 << 10]
    for text in ("4", "", "G", "-1G", "fourG", "nanG", "infG"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number and K, M, G or T"):
            size_in_bytes(text)


def test_the_commands_bound_the_codec_and_return_what_is_freed(monkeypatch):
    tokenizer, calls = SimpleNamespace(codec=SimpleNamespace(memory=None)), []
    monkeypatch.setattr(vft.Tokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    for command in ("decode", "encode"):
        args = parser_of([command]).parse_args(["a", "-o", "b", "--memory", "4G"])
        load_tokenizer(args)
        assert tokenizer.codec.memory == 4 << 30
    # M_MMAP_THRESHOLD of malloc.h
    assert calls == [(-3, 4 << 20)] * 2
    # another C library has no such call
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    return_memory()


def test_the_command_refuses_memory_of_an_embedded_codec(tmp_path, capsys):
    from vft.train.procedural import batch
    from vft.video import write_video

    clip = (batch(0, range(1), size=64)[0].permute(1, 2, 3, 0) * 127.5 + 127.5).byte()
    write_video(tmp_path / "a.mp4", [clip], 25.0, 18)
    assert main(["encode", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "a.vft"), "--memory", "4G"]) == 2
    assert "--memory bounds the codec VidTok, tiny has" in capsys.readouterr().err

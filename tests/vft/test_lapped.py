"""The lapped codec: what it loses, that its blocks do not show, and how it is fitted and stored."""

import pytest
import torch
from safetensors.torch import save_file

from vft.evaluate import HELD_OUT_SEED
from vft.lapped import AROUND, CHANNELS, LappedCodec, around, asset, shapes
from vft.metrics import psnr
from vft.train import procedural
from vft.train.codec import first, fit, follow
from vft.vae import fit_linear_codec, load_codec


@pytest.fixture(scope="module")
def codec():
    return load_codec("lapped")


@pytest.fixture(scope="module")
def clips():
    return procedural.batch(HELD_OUT_SEED, range(16))


def border_ratio(video):
    """Mean step across the borders of 8 x 8 blocks over the mean step elsewhere, along x and y."""
    ratios = []
    for axis in (3, 4):
        steps = video.diff(dim=axis).abs().mean([d for d in range(5) if d != axis])
        border = torch.arange(len(steps)) % 8 == 7
        ratios.append(float(steps[border].mean() / steps[~border].mean()))
    return ratios


def test_size_and_parameters(codec):
    assert codec.channels == 44 and sum(t.numel() for t in codec.state_dict().values()) < 1_000_000
    assert sum(asset(channels).stat().st_size for channels in CHANNELS) < 3_000_000


def test_it_loses_less_than_the_block_transform_and_shows_no_blocks(codec, clips):
    lapped, blocks = (c.decode(c.encode(clips)) for c in (codec, load_codec("linear")))
    assert psnr(lapped, clips).mean() > psnr(blocks, clips).mean() + 3
    assert max(border_ratio(lapped)) < 1.2 < 2 < min(border_ratio(blocks))


@pytest.mark.parametrize("size", [(1, 8, 8), (5, 16, 8), (17, 24, 40)])
def test_shapes_follow_latent_shape(codec, size):
    latents = codec.encode(torch.rand(2, 3, *size) * 2 - 1)
    assert latents.shape == (2, *codec.latent_shape(*size)) and latents.dtype == torch.float32
    assert codec.decode(latents).shape == (2, 3, *size)
    assert codec.decode(latents[:0]).shape == (0, 3, *size)


def test_latents_are_causal(codec):
    """Frames 9.. (latent frames 3..) do not change what comes before, in either direction."""
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    a, b = codec.encode(video), codec.encode(torch.cat([video[:, :, :9], -video[:, :, 9:]], 2))
    torch.testing.assert_close(a[:, :, :3], b[:, :, :3], rtol=1e-4, atol=1e-4)
    assert (a[:, :, 3:] - b[:, :, 3:]).abs().amax() > 0.1
    c, d = codec.decode(a), codec.decode(torch.cat([a[:, :, :3], -a[:, :, 3:]], 2))
    torch.testing.assert_close(c[:, :, :9], d[:, :, :9], rtol=1e-3, atol=1e-3)
    assert (c[:, :, 9:] - d[:, :, 9:]).abs().amax() > 0.1
    # the first frame alone
    still = codec.decode(codec.encode(video[:, :, :1]))
    torch.testing.assert_close(c[:, :, :1], still, rtol=1e-4, atol=1e-4)


def test_the_first_channels_are_a_codec_that_follows_the_linear_one(codec, clips):
    linear = load_codec("linear")
    fewer = load_codec("lapped", channels=24)
    latents, wanted = fewer.encode(clips), linear.encode(clips)
    torch.testing.assert_close(latents, codec.encode(clips)[:, :24], rtol=1e-4, atol=1e-4)
    error = (latents[:, :16] - wanted).square().mean((0, 2, 3, 4)) / wanted.square().mean((0, 2, 3, 4))
    assert error.max() < 0.06
    lapped, blocks = (psnr(c.decode(z), clips).mean() for c, z in ((fewer, latents), (linear, wanted)))
    assert lapped > blocks + 1
    assert max(border_ratio(fewer.decode(latents))) < 1.25
    with pytest.raises(ValueError, match=r"channels of the codec 'lapped' must be one of \(24, 44\), got 20"):
        load_codec("lapped", channels=20)


def test_following_turns_channels_and_keeps_pictures():
    """A codec turned towards another decodes to the same pictures, its orthogonal channels costing what they say."""
    few = {"seed": 3, "clips": 8, "size": 32}
    codec, linear = fit(**few, channels=8, rounds=1), fit_linear_codec(**few, channels=4)
    turned = follow(codec, linear, seed=3, clips=8, among=6)
    clips = procedural.batch(3, range(8))
    torch.testing.assert_close(
        turned.decode(turned.encode(clips)), codec.decode(codec.encode(clips)), rtol=0, atol=2e-3
    )
    theirs, ours, before = linear.encode(clips), turned.encode(clips), codec.encode(clips)
    far = lambda z: ((z[:, :4] - theirs).square().mean() / theirs.square().mean()).item()  # noqa: E731
    assert far(ours) < 0.1 < far(before)
    for among in (3, 9):
        with pytest.raises(ValueError, match=f"among must be in 4..8, got {among}"):
            follow(codec, linear, seed=3, clips=8, among=among)


def test_first_channels_have_a_synthesis_of_their_own():
    few = {"seed": 3, "clips": 8, "size": 32}
    codec, clips = fit(**few, channels=8, rounds=1), procedural.batch(3, range(8), size=32)
    latents, fewer = codec.encode(clips), first(codec, 5, **few)
    torch.testing.assert_close(fewer.encode(clips), latents[:, :5], rtol=1e-4, atol=1e-4)
    cut = torch.cat([latents[:, :5], torch.zeros_like(latents[:, 5:])], 1)
    own, of_all = (psnr(x, clips).mean() for x in (fewer.decode(latents[:, :5]), codec.decode(cut)))
    assert own > of_all + 0.02, (own, of_all)
    for channels in (0, 9):
        with pytest.raises(ValueError, match=f"channels must be in 1..8, got {channels}"):
            first(codec, channels, **few)


def test_latents_suit_a_flow_model(clips):
    latents = load_codec("lapped", channels=24).encode(clips).transpose(0, 1).flatten(1)
    assert 0.6 < latents.var(1).mean() < 1.5
    assert latents.std(1).max() < 8 * latents.std(1).min()


def test_pixel_weight_is_what_an_error_costs(codec):
    """One latent off by 1, in the middle of a picture of zeros: the squared pixels that it moves in its own frames."""
    weight = codec.pixel_weight(3)
    assert weight.shape == (44, 3, 1, 1) and weight.mean() == pytest.approx(1)
    base = torch.zeros(1, codec.channels, 3, 5, 5)
    costs = []
    for channel, frame in ((0, 0), (7, 0), (0, 2), (7, 2), (39, 2)):
        off = base.clone()
        off[0, channel, frame, 2, 2] = 1
        cost = (
            (codec.decode(off) - codec.decode(base))[:, :, :1] if frame == 0 else codec.decode(off) - codec.decode(base)
        )
        costs.append(cost.square().sum() / weight[channel, frame, 0, 0])
    costs = torch.stack(costs)
    assert (costs / costs.mean() - 1).abs().max() < 0.1


def test_windows_are_three_blocks_wide():
    blocks = torch.arange(12.0).view(1, 1, 3, 4, 1)
    near = around(blocks)
    assert near.shape == (1, 1, 3, 4, AROUND)
    assert near[0, 0, 1, 1].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert near[0, 0, 0, 3].tolist() == [2, 3, 3, 2, 3, 3, 6, 7, 7]


def test_a_fit_is_repeatable_better_than_blocks_and_saved_whole(tmp_path):
    few = {"seed": 3, "clips": 8, "channels": 6, "size": 32}
    codec, again, blocks = fit(**few, rounds=1), fit(**few, rounds=1, threads=2), fit_linear_codec(**few)
    clips = procedural.batch(3, range(8), size=32)
    lapped, plain = (psnr(c.decode(c.encode(clips)), clips).mean() for c in (codec, blocks))
    assert lapped > plain + 0.5, (lapped, plain)
    codec.save(tmp_path / "codec.safetensors")
    loaded = LappedCodec.load(tmp_path / "codec.safetensors")
    assert loaded.channels == 6 and loaded.metadata["seed"] == "3"
    assert {key: tuple(t.shape) for key, t in loaded.state_dict().items()} == shapes(6)
    for key, tensor in codec.state_dict().items():
        torch.testing.assert_close(tensor, again.state_dict()[key], rtol=1e-3, atol=1e-3)
        assert torch.equal(tensor.half().float(), loaded.state_dict()[key]), key
    assert [p.name for p in tmp_path.iterdir()] == ["codec.safetensors"]


def test_other_files_and_settings_are_refused(tmp_path):
    (tmp_path / "noise").write_bytes(b"not a tensor in sight")
    save_file({"first_analysis": torch.zeros(4, 192)}, tmp_path / "partial")
    with pytest.raises(ValueError, match="not a safetensors file"):
        LappedCodec.load(tmp_path / "noise")
    with pytest.raises(ValueError, match="must hold a lapped codec"):
        LappedCodec.load(tmp_path / "partial")
    for name, settings in (("channels", {"channels": 0}), ("clips", {"clips": 0}), ("rounds", {"rounds": 0})):
        with pytest.raises(ValueError, match=f"{name} must be"):
            fit(**{"seed": 0, "clips": 1} | settings)
    with pytest.raises(ValueError, match="state_dict of an embedded codec must hold a refiner alone"):
        load_codec("lapped", {"x": torch.zeros(1)})

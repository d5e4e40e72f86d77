"""Latent codecs: sizes, causality, the embedded linear codec's quality, VidTok against its published network."""

import copy

import pytest
import torch
from safetensors.torch import save_file

import flexkernels
from vft import vidtok as vidtok_module
from vft.train import procedural
from vft.vae import LAPPED, LINEAR, VIDTOK, LinearCodec, fit_linear_codec, load_codec
from vft.vidtok import VidTokCodec

WIDTH = 8


@pytest.fixture(scope="module")
def linear():
    return load_codec(LINEAR)


@pytest.fixture(scope="module")
def clips():
    return procedural.batch(5, range(16))


@pytest.fixture(scope="module")
def vidtok(weights):
    return VidTokCodec.from_state_dict(weights, width=WIDTH)


@pytest.fixture(scope="module")
def weights():
    """Weights of the small network that follow from their names' order alone."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in VidTokCodec(width=WIDTH).state_dict().items()}
    weights = {}
    for i, key in enumerate(sorted(shapes)):
        wave = _waves(*shapes[key], step=1 + 0.37 * i, phase=i)
        if wave.ndim > 1:
            wave *= 2 * wave[0].numel() ** -0.5
        else:
            wave = 0.3 * wave + key.endswith("norm.weight")
        weights[key] = wave.float()
    return weights


def _waves(*shape, step=1.0, phase=0.0, power=1.0):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n**power * step + phase).reshape(shape)


def _eight(tensor):
    """Eight values spread over a tensor."""
    return tensor.flatten()[torch.arange(8) * (tensor.numel() - 1) // 7]


def _psnr(a, b):
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))


@pytest.mark.parametrize("size", [(1, 8, 8), (5, 16, 8), (17, 24, 40)])
def test_shapes_follow_latent_shape(linear, vidtok, size):
    for codec in (linear, vidtok):
        expected = (2, *codec.latent_shape(*size))
        assert expected == (2, 16, 1 + size[0] // 4, size[1] // 8, size[2] // 8)
        latents = codec.encode(torch.rand(2, 3, *size) * 2 - 1)
        assert latents.shape == expected and latents.dtype == torch.float32
        video = codec.decode(latents)
        assert video.shape == (2, 3, *size) and video.dtype == torch.float32


def test_an_empty_batch_stays_empty(linear):
    assert linear.decode(linear.encode(torch.zeros(0, 3, 5, 8, 8))).shape == (0, 3, 5, 8, 8)


@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (1, 1, 5, 8, 8), (1, 3, 4, 8, 8), (1, 3, 0, 8, 8), (1, 3, 5, 12, 8)])
def test_wrong_video_shape_is_refused(linear, vidtok, shape):
    for codec in (linear, vidtok):
        with pytest.raises(ValueError, match=r"video .*must"):
            codec.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 2, 1, 1), (1, 15, 2, 1, 1), (1, 16, 0, 1, 1)])
def test_wrong_latent_shape_is_refused(linear, vidtok, shape):
    for codec in (linear, vidtok):
        with pytest.raises(ValueError, match="latents must"):
            codec.decode(torch.zeros(shape))


def test_integers_are_refused(linear):
    with pytest.raises(TypeError, match="video must be floating point"):
        linear.encode(torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="latents must be floating point"):
        linear.decode(torch.zeros(1, 16, 2, 1, 1, dtype=torch.int64))


def test_latents_are_causal(linear, vidtok):
    """Frames 9.. (latent frames 3..) do not change what comes before, in either direction."""
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    changed = torch.cat([video[:, :, :9], -video[:, :, 9:]], 2)
    for codec in (linear, vidtok):
        a, b = codec.encode(video), codec.encode(changed)
        torch.testing.assert_close(a[:, :, :3], b[:, :, :3], rtol=1e-4, atol=1e-4)
        assert (a[:, :, 3:] - b[:, :, 3:]).abs().amax() > 0.1
        c, d = codec.decode(a), codec.decode(torch.cat([a[:, :, :3], -a[:, :, 3:]], 2))
        torch.testing.assert_close(c[:, :, :9], d[:, :, :9], rtol=1e-3, atol=1e-3)
        assert (c[:, :, 9:] - d[:, :, 9:]).abs().amax() > 0.1


def test_linear_reconstruction_quality(linear, clips):
    """Measured 25.7 dB on 64 held-out clips; the fit used another seed."""
    psnr = _psnr(linear.decode(linear.encode(clips)).clamp(-1, 1), clips)
    assert psnr.mean() > 25 and psnr.min() > 18


def test_linear_decode_inverts_encode(linear):
    latents = torch.randn(2, 16, 5, 3, 2)
    torch.testing.assert_close(linear.encode(linear.decode(latents)), latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [LINEAR, LAPPED])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_embedded_codecs_compute_in_the_dtype_of_their_weights(name, dtype, tolerance, clips):
    """A tokenizer that is cast after a first use takes its codec along."""
    codec = load_codec(name)
    cast, latents = copy.deepcopy(codec).to(dtype), codec.encode(clips[:1])
    for got, want in ((cast.encode(clips[:1]), latents), (cast.decode(latents), codec.decode(latents))):
        assert got.dtype == torch.float32 and (got - want).norm() < tolerance * want.norm()


def test_linear_latents_suit_a_flow_model(linear, clips):
    latents = linear.encode(clips).transpose(0, 1).flatten(1)
    assert 0.6 < latents.var(1).mean() < 1.5
    assert latents.std(1).max() < 6 * latents.std(1).min()


def test_linear_fit_is_repeatable_and_saved_whole(tmp_path):
    codec = fit_linear_codec(seed=3, clips=4, channels=6, size=32)
    again = fit_linear_codec(seed=3, clips=4, channels=6, size=32, threads=2)
    codec.save(tmp_path / "codec.safetensors")
    loaded = LinearCodec.load(tmp_path / "codec.safetensors")
    assert loaded.channels == 6 and loaded.metadata["seed"] == "3"
    for key, tensor in codec.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
        assert torch.equal(tensor, loaded.state_dict()[key]), key
    for basis in (codec.first_basis, codec.group_basis):
        torch.testing.assert_close(basis @ basis.T, torch.eye(6), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["codec.safetensors"]


def test_linear_load_refuses_other_files(tmp_path):
    (tmp_path / "noise").write_bytes(b"not a tensor in sight")
    save_file({"first_basis": torch.zeros(4, 192)}, tmp_path / "partial")
    with pytest.raises(ValueError, match="not a safetensors file"):
        LinearCodec.load(tmp_path / "noise")
    with pytest.raises(ValueError, match="must hold a linear codec"):
        LinearCodec.load(tmp_path / "partial")
    with pytest.raises(ValueError, match="channels must be"):
        fit_linear_codec(0, 1, channels=0)
    with pytest.raises(ValueError, match="clips must be"):
        fit_linear_codec(0, 0)


def test_load_codec_by_name(linear):
    assert linear.name == LINEAR and linear.channels == 16 and (linear.temporal_stride, linear.spatial_stride) == (4, 8)
    with pytest.raises(ValueError, match="codec must be one of"):
        load_codec("latents_16")
    with pytest.raises(ValueError, match="state_dict must hold the weights"):
        load_codec(VIDTOK)
    with pytest.raises(ValueError, match="must hold a refiner alone"):
        load_codec(LINEAR, {"x": torch.zeros(1)})


def test_vidtok_has_the_published_parameters():
    """Counts, and names of every kind of module in the released checkpoint."""
    with torch.device("meta"):
        parameters = VidTokCodec().state_dict()
    assert len(parameters) == 416
    assert sum(tensor.numel() for tensor in parameters.values()) == 157_949_351
    shapes = {key.removeprefix("vidtok."): tuple(tensor.shape) for key, tensor in parameters.items()}
    expected = {
        "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.down_temporal.0.block.1.conv2.conv.weight": (128, 128, 3),
        "encoder.down_temporal.1.downsample.mix_factor": (1,),
        "encoder.down_temporal.2.downsample.conv.conv.weight": (512, 512, 3, 3, 3),
        "encoder.mid.attn_1.proj_out.conv.weight": (512, 512, 1, 1, 1),
        "encoder.conv_out.conv.bias": (32,),
        "decoder.mid.block_2.norm1.norm.weight": (512,),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up_temporal.2.upsample.conv.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up_temporal.3.block.2.norm2.norm.bias": (512,),
        "decoder.norm_out.norm.weight": (128,),
        "decoder.conv_out.conv.weight": (3, 128, 3, 3, 3),
    }
    assert {key: shapes.get(key) for key in expected} == expected


def test_vidtok_matches_the_published_network(vidtok):
    """The numbers are the published code's on the same weights, computed in float64."""
    latents = vidtok.encode(_waves(1, 3, 9, 16, 24, power=1.1).float())
    published = [0.06092, 0.41198, 1.41964, -0.43599, 0.09503, -0.63966, 0.30956, -0.67602]
    torch.testing.assert_close(_eight(latents), torch.tensor(published), rtol=0, atol=1e-4)
    video = vidtok.decode(_waves(1, 16, 3, 2, 3, power=1.1).float())
    published = [0.48017, 0.48845, 0.27225, -0.35220, -0.42151, -0.37305, -0.17536, -0.11260]
    torch.testing.assert_close(_eight(video), torch.tensor(published), rtol=0, atol=2e-3)


def test_vidtok_samples_only_with_a_generator(vidtok):
    video = _waves(1, 3, 9, 16, 24, power=1.1).float()
    state = torch.get_rng_state()
    mean = vidtok.encode(video)
    assert torch.equal(mean, vidtok.encode(video))
    samples = [vidtok.encode(video, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    # the posterior's log variance, from the published code
    log_variance = torch.tensor([-0.22017, -0.17997, -1.82871, -0.22349, -0.22683, 1.37299, 0.08036, 0.39835])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    expected = _eight(mean) + _eight(noise) * torch.exp(0.5 * log_variance)
    torch.testing.assert_close(_eight(samples[0]), expected, rtol=0, atol=1e-4)


def test_vidtok_runs_in_bfloat16(weights):
    codec = VidTokCodec.from_state_dict({key: w.bfloat16() for key, w in weights.items()}, width=WIDTH)
    video = _waves(1, 3, 5, 16, 16, power=1.1).float()
    latents = codec.encode(video)
    full = codec.float().encode(video)
    assert latents.dtype == torch.float32 and (latents - full).std() < 0.2 * full.std()
    assert codec.bfloat16().decode(latents).dtype == torch.float32


@pytest.fixture(scope="module")
def random_vidtok():
    """Channels enough for norms over them to keep rounding small."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return VidTokCodec(width=16)


def test_vidtok_is_as_exact_as_the_plain_network(random_vidtok):
    """Ours, on transformed tiles, against PyTorch's convolutions in float32; both against float64."""
    exact = copy.deepcopy(random_vidtok).double()
    video, latents = torch.rand(1, 3, 5, 16, 24) * 2 - 1, torch.randn(1, 16, 2, 2, 3)
    video64, latents64 = (x.double().permute(0, 2, 3, 4, 1) for x in (video, latents))
    with torch.no_grad():
        expected = exact.vidtok.encoder(video64)[..., :16], exact.vidtok.decoder(latents64)
    found = {}
    for backend in ("auto", "reference"):
        with flexkernels.backend(backend):
            results = [
                codec.permute(0, 2, 3, 4, 1) for codec in (random_vidtok.encode(video), random_vidtok.decode(latents))
            ]
        found[backend] = [(y - z).norm() / z.norm() for y, z in zip(results, expected, strict=True)]
    for ours, plain in zip(found["auto"], found["reference"], strict=True):
        assert plain < 1e-5 and ours < 5 * plain


def test_vidtok_in_bfloat16_is_near(random_vidtok):
    codec = copy.deepcopy(random_vidtok).bfloat16()
    latents = torch.randn(1, 16, 2, 2, 3)
    low, full = codec.decode(latents), codec.float().decode(latents)
    assert 10 * torch.log10((full.amax() - full.amin()) ** 2 / (low - full).square().mean()) > 45


def test_vidtok_in_bfloat16_norms_in_one_kernel_where_triton_is(random_vidtok, monkeypatch):
    """As on a GPU, with our kernel of the CPU in the place of Triton's: nearer to the exact one than two calls are."""
    calls, norm_silu = [], vidtok_module.norm_silu
    monkeypatch.setattr(vidtok_module, "norm_silu", lambda *args, **k: (calls.append(1), norm_silu(*args, **k))[1])
    codec = copy.deepcopy(random_vidtok).bfloat16()
    latents, found = torch.randn(1, 16, 2, 2, 3), []
    for one in (False, True):
        monkeypatch.setattr(vidtok_module, "by_triton", lambda x, one=one: one)
        found.append(codec.decode(latents))
        assert bool(calls) == one
    two_calls, one_kernel = ((x - codec.float().decode(latents)).norm() for x in found)
    assert one_kernel < 1.1 * two_calls


@pytest.mark.parametrize("count", [1, 2, 9])
def test_vidtok_takes_a_clip_in_pieces(random_vidtok, count):
    """The frames that each convolution has seen stand for what came before."""
    video, latents = torch.rand(1, 3, 17, 8, 16) * 2 - 1, torch.randn(1, 16, 5, 1, 2)
    codec = copy.deepcopy(random_vidtok)
    expected = codec.encode(video), codec.decode(latents)
    codec.latent_frames = count
    for got, want in zip((codec.encode(video), codec.decode(latents)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    codec.latent_frames = 0
    with pytest.raises(ValueError, match="latent_frames must be None or at least 1, got 0"):
        codec.decode(latents)


def test_vidtok_prepares_changed_weights_anew(weights):
    codec = VidTokCodec.from_state_dict({key: w.clone() for key, w in weights.items()}, width=WIDTH)
    latents = torch.randn(1, 16, 2, 2, 2)
    before = codec.decode(latents)
    codec.vidtok.decoder.conv_out.conv.weight.mul_(2)
    changed = codec.decode(latents)
    assert (changed - before).abs().amax() > 0.1
    again = VidTokCodec.from_state_dict(codec.state_dict(), width=WIDTH)
    assert torch.equal(again.decode(latents), changed)


def test_vidtok_names_what_does_not_fit(weights):
    missing = {key: w for key, w in weights.items() if key != "vidtok.decoder.conv_in.conv.bias"}
    with pytest.raises(ValueError, match=r"missing keys vidtok\.decoder\.conv_in\.conv\.bias"):
        VidTokCodec.from_state_dict(missing, width=WIDTH)
    with pytest.raises(ValueError, match="surplus keys extra"):
        VidTokCodec.from_state_dict(weights | {"extra": torch.zeros(1)}, width=WIDTH)
    with pytest.raises(ValueError, match=r"conv_out\.conv\.bias.*shape \[3\], got \[4\]"):
        VidTokCodec.from_state_dict(weights | {"vidtok.decoder.conv_out.conv.bias": torch.zeros(4)}, width=WIDTH)
    with pytest.raises(ValueError, match=r"missing keys .* and 412 more"):
        load_codec(VIDTOK, {})

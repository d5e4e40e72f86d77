"""The refiner of decoded frames: its formula, what it leaves alone, and how it lies in a checkpoint."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import vft
from vft.config import make_config, parse_config
from vft.refiner import PREFIX, Refiner
from vft.train import start
from vft.vae import load_codec

SMALL = make_config(
    encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=2, codec="lapped",
    channels=24, size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def refiner():
    torch.manual_seed(0)
    made = Refiner().eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def state(refiner):
    return {PREFIX + name: tensor for name, tensor in refiner.state_dict().items()}


def test_a_new_one_changes_nothing():
    video = torch.rand(2, 3, 5, 16, 24)
    assert torch.equal(Refiner()(video), video)


def test_the_formula(refiner):
    """Of one frame of 16 x 8 pixels, place by place."""
    video = torch.rand(1, 3, 1, 16, 8) * 2 - 1
    frame = video[0, :, 0].double()
    model = {name: p.double() for name, p in refiner.named_parameters()}
    rows = [
        torch.cat([frame[c, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten() for c in range(3)])
        for y in range(4)
        for x in range(2)
    ]
    x = torch.stack(rows, 1).view(1, 48, 4, 2)
    h = F.conv2d(x, model["first.weight"], model["first.bias"], padding=1)
    for y in range(4):
        for z in range(2):
            h[0, :, y, z] += model["place"][:, y % 2, z % 2]
    for i in range(4):
        silu = h / (1 + (-h).exp())
        h = h + F.conv2d(silu, model[f"convs.{i}.weight"], model[f"convs.{i}.bias"], padding=1)
    change = F.conv2d(h / (1 + (-h).exp()), model["last.weight"], model["last.bias"], padding=1)[0]
    got = refiner(video)[0, :, 0]
    for y in range(4):
        for z in range(2):
            patch = (slice(None), slice(4 * y, 4 * y + 4), slice(4 * z, 4 * z + 4))
            want = frame[patch] + change[:, y, z].view(3, 4, 4)
            torch.testing.assert_close(got[patch].double(), want, atol=1e-5, rtol=1e-5)


def test_frames_and_clips_are_independent(refiner):
    video = torch.rand(2, 3, 5, 16, 16)
    whole = refiner(video)
    torch.testing.assert_close(refiner(video[1:, :, 2:3]), whole[1:, :, 2:3])
    assert refiner(video[:0]).shape == (0, 3, 5, 16, 16)
    assert refiner(video.transpose(3, 4)).shape == video.shape
    half = copy.deepcopy(refiner).half()(video.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole, atol=5e-3, rtol=0)


def test_a_checkpoint_has_it_beside_the_codec(refiner, tmp_path):
    torch.manual_seed(2)
    plain = vft.Tokenizer(parse_config(SMALL), "plain").eval()
    plain.save(tmp_path / "a.safetensors", codec=state(refiner))
    model = vft.Tokenizer.from_pretrained(tmp_path / "a.safetensors")
    assert model.fingerprint == plain.fingerprint
    latents = torch.randn(1, 24, 2, 2, 2)
    want = refiner(plain.codec.decode(latents))
    torch.testing.assert_close(model.codec.decode(latents), want)
    # losses see the linear codec alone
    assert torch.equal(model.codec.render(latents), plain.codec.render(latents))
    # wherever the model goes
    model.save_pretrained(tmp_path / "folder")
    model.save(tmp_path / "b.safetensors")
    tuned, _ = start.tokenizer(str(tmp_path / "a.safetensors"), registers=3)
    others = [vft.Tokenizer.from_pretrained(tmp_path / name) for name in ("folder", "b.safetensors")]
    for other in (*others, tuned, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.codec.decode(latents), model.codec.decode(latents))
    assert next(copy.deepcopy(model).bfloat16().codec.refiner.parameters()).dtype == torch.bfloat16
    # the codec's own file has no part of it
    model.codec.save(tmp_path / "codec.safetensors")
    assert vft.lapped.LappedCodec.load(tmp_path / "codec.safetensors").refiner is None


def test_another_codec_keeps_it(refiner, tmp_path):
    """It looks at pixels, whatever the latents' channels."""
    vft.Tokenizer(parse_config(SMALL)).save(tmp_path / "a.safetensors", codec=state(refiner))
    model, _ = start.tokenizer(str(tmp_path / "a.safetensors"), codec="lapped", channels=44)
    assert model.config.channels == 44
    latents = torch.randn(1, 44, 2, 2, 2)
    torch.testing.assert_close(model.codec.decode(latents), refiner(load_codec("lapped").decode(latents)))


def test_loading_draws_no_random_numbers(refiner):
    torch.manual_seed(5)
    load_codec("lapped", state(refiner))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_what_does_not_fit_is_named(refiner):
    with pytest.raises(ValueError, match=r"must hold a refiner alone, refiner\.\*, got 'x'"):
        load_codec("linear", {"x": torch.zeros(1)})
    tensors = state(refiner)
    del tensors[PREFIX + "place"]
    with pytest.raises(ValueError, match=r"must hold a whole refiner: Missing key.*place"):
        load_codec("lapped", tensors)
    with pytest.raises(ValueError, match=r"must hold a whole refiner: size mismatch for place"):
        load_codec("lapped", state(refiner) | {PREFIX + "place": torch.zeros(3)})

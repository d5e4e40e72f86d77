"""Decoders whose matrices are fp8: what is rounded, how far the result moves, what the device is asked for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden_tokenizer import CASES, load, samples
from paths import TOKENIZERS

import vft
from vft import fp8
from vft.fp8 import Fp8Linear
from vft.layers import Merged


def relative(got, want) -> float:
    return sum(float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)) / len(want)


def test_rows_are_rounded_to_the_nearest_fp8_value():
    x = torch.cat([torch.randn(5, 40) * 10.0 ** torch.arange(-3, 2)[:, None], torch.zeros(1, 40)])
    rounded, scale = fp8.round_rows(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (6, 1) and scale.dtype == torch.float32
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    scaled = (x / scale).double()
    nearest = (scaled[..., None] - values.double()).abs().amin(-1)
    assert torch.equal((scaled - rounded.double()).abs(), nearest)
    # the largest of a row is the largest that there is, and nothing is lost to a row of zeros
    assert (rounded[:5].float().abs().amax(1) == 448).all() and (fp8.widen(rounded, scale, x.dtype)[5] == 0).all()
    # the scale of a bfloat16 row is that of its float32 values
    assert torch.equal(fp8.round_rows(x.bfloat16())[1], fp8.round_rows(x.bfloat16().float())[1])


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_product_of_what_was_rounded(bias):
    layer = torch.nn.Linear(33, 17, bias=bias)
    x = torch.randn(7, 33)
    weight, rows = (fp8.widen(*fp8.round_rows(t), torch.float64) for t in (layer.weight.detach(), x))
    want = F.linear(rows, weight, layer.bias.double() if bias else None)
    rounded = Fp8Linear(layer.weight, layer.bias)
    torch.testing.assert_close(rounded(x).double(), want, rtol=1e-5, atol=1e-5)
    # it keeps its weights where the model is cast, and none of them is a parameter that is saved
    kept = rounded.weight.clone().view(torch.uint8)
    rounded.to(torch.bfloat16)
    assert torch.equal(rounded.weight.view(torch.uint8), kept) and rounded.scale.dtype == torch.float32
    assert rounded(x.bfloat16()).dtype == torch.bfloat16 and list(rounded.state_dict()) == ["bias"] * bias


@pytest.mark.parametrize("case", CASES)
def test_velocities_move_a_little_and_ids_do_not(case):
    model, io, _ = load(case)
    rounded = copy.deepcopy(model).quantize()
    x, ids = samples(io, "noised"), samples(io, "tokens")
    want, got = (m.velocity(x, 0.6, ids, [4, 11]) for m in (model, rounded))
    assert 0.002 < relative(got, want) < 0.1
    latents = samples(io, "noise")
    for a, b in zip(model.encode_latents(latents), rounded.encode_latents(latents), strict=True):
        assert torch.equal(a, b)
    assert rounded.fingerprint == model.fingerprint


def test_what_is_rounded_and_what_is_not():
    model = vft.Tokenizer.from_pretrained("tiny", weights="fp8")
    exact = vft.Tokenizer.from_pretrained("tiny")
    assert all(module.quantized for module in model.decoder.modules() if isinstance(module, Merged))
    assert not any(module.quantized for module in model.encoder.modules() if isinstance(module, Merged))
    held = lambda m: sum(t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers()))  # noqa: E731
    matrices = sum(p.numel() for n, p in exact.decoder.blocks.named_parameters() if "adaLN" not in n and p.dim() == 2)
    # a byte a weight, a scale an output row, and hidden units that fill up the width
    assert held(exact) - 3.1 * matrices < held(model) < held(exact) - 2.8 * matrices
    for save in (model.save, model.save_pretrained):
        with pytest.raises(ValueError, match="fp8 weights cannot be saved: save the one it was made from"):
            save("unused")
    # once more changes nothing
    before = model.decoder.blocks[0].attn.qkv.weight
    assert model.quantize().decoder.blocks[0].attn.qkv.weight is before
    # weights that were joined before give the same
    prepared = copy.deepcopy(exact).prepare().quantize()
    down, want = (m.decoder.blocks[0].mlp.fc2.weight.float() for m in (prepared, model))
    assert torch.equal(down, want)


def test_wrong_requests(monkeypatch):
    with pytest.raises(ValueError, match="weights must be None or 'fp8', got 'int8'"):
        vft.Tokenizer.from_pretrained("tiny", weights="int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"weights 'fp8' needs a GPU of compute capability 8\.9, got 8\.0"):
        vft.Tokenizer.from_pretrained(TOKENIZERS / "base", weights="fp8", device="cuda")


def test_products_are_those_of_the_device(monkeypatch):
    """Where it multiplies fp8 in bfloat16, with sides of whole sixteens."""
    layer = Fp8Linear(torch.randn(32, 48), torch.randn(32)).to(torch.bfloat16)
    x, calls = torch.randn(5, 48).bfloat16(), []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.shape == (5, 1) and scale_b.shape == (1, 32)
        assert a.is_contiguous() and b.T.is_contiguous() and scale_a.is_contiguous() and scale_b.is_contiguous()
        calls.append(b.shape)
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    want = layer(x)
    assert not calls
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8, "multiplies", lambda x, weight: True)
    got = layer(x)
    assert calls == [(48, 32)]
    assert (got - want).abs().max() <= 2**-6 * want.abs().max()

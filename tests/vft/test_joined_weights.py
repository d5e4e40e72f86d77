"""prepare() joins the weights of a block: published names stay views of them, and results the same."""

import copy

import torch

import vft
from vft import layers
from vft.config import make_config, parse_config
from vft.packing import Member

T = 0.6


def odd_model():
    torch.manual_seed(0)
    raw = make_config(encoder_width=64, decoder_width=192, head_dim=32, registers=4, codec="linear", size=32)
    model = vft.Tokenizer(parse_config(raw)).eval().requires_grad_(False)
    for p in model.decoder.parameters():
        p.copy_(torch.randn_like(p) * 0.1)
    return model


def test_prepared_weights_are_views_and_change_nothing(tmp_path):
    model = odd_model()
    plain = {name: p.clone() for name, p in model.named_parameters()}
    x, ids = [torch.randn(model.config.channels, 2, 4, 4)], [torch.randint(64000, (2, 4))]
    members = (Member(0, 4),)
    packed = model.decoder.packing(x, members, True)
    codes = torch.zeros(8, len(model.config.levels))
    velocity = lambda: model.decoder.velocity(  # noqa: E731
        x, model.decoder.embed_registers(codes, packed), model.decoder.modulation(torch.tensor([T])), packed
    )[0]
    before = velocity()
    attn, mlp = model.decoder.blocks[0].attn, model.decoder.blocks[0].mlp
    assert attn._joined is None
    model.prepare()
    joined = attn._joined["weight"]
    assert attn.wk.weight.data_ptr() == joined[192:].data_ptr()
    assert mlp.fc1.out_features == 512 and len(mlp._joined["weight"]) % (2 * layers.MLP_ALIGNMENT) == 0
    torch.testing.assert_close(velocity(), before, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        assert torch.equal(p, plain[name]), name
    # a change through a published name is seen, a copy is its own, and saving gives the original names and shapes
    other = copy.deepcopy(model)
    attn.wk.weight.mul_(2)
    assert torch.equal(joined[192:384], 2 * plain["decoder.blocks.0.attn.wk.weight"])
    assert torch.equal(other.decoder.blocks[0].attn.wk.weight, plain["decoder.blocks.0.attn.wk.weight"])
    other.prepare().save(tmp_path / "model.safetensors")
    again = vft.Tokenizer.from_pretrained(tmp_path / "model.safetensors")
    for name, p in again.named_parameters():
        assert torch.equal(p, plain[name]), name
    assert torch.equal(again.velocity(x, T, ids)[0], other.velocity(x, T, ids)[0])


def test_a_cast_model_prepares_anew():
    model = odd_model().prepare()
    model.to(torch.bfloat16)
    assert model.decoder.blocks[0].attn._joined is None
    model.prepare()
    assert model.decoder.blocks[0].mlp._joined["weight_out"].dtype == torch.bfloat16


def test_training_after_preparing_has_gradients():
    model = odd_model().prepare()
    model.requires_grad_()
    model.encoder([torch.randn(model.config.channels, 2, 4, 4)]).sum().backward()
    assert model.encoder.blocks[0].attn.wk.weight.grad.abs().sum() > 0

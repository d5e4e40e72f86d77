import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from helpers import called_ops  # noqa: E402

from flexkernels import sample_logits  # noqa: E402
from flexkernels.integrations import transformers as ours  # noqa: E402

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)


@pytest.fixture(scope="module", autouse=True)
def registered():
    ours.register()
    ours.register()


def llama():
    config = transformers.LlamaConfig(num_key_value_heads=2, **SMALL)
    return transformers.LlamaForCausalLM(config).eval()


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


def outputs(model, implementation, *args, **settings):
    model.set_attn_implementation(implementation)
    return model(*args, **settings)[0]


def ids(batch=2, length=11):
    return torch.randint(50, (batch, length))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_models_with_padding(make, side):
    model, tokens = make(), ids()
    mask = torch.ones_like(tokens)
    if side == "left":
        mask[1, :4] = 0
    if side == "right":
        mask[1, -4:] = 0
    got, expected = (outputs(model, name, tokens, attention_mask=mask) for name in ("flexkernels", "sdpa"))
    exists = mask.bool()
    torch.testing.assert_close(got[exists], expected[exists], rtol=1e-4, atol=1e-5)


def test_gradients_of_a_causal_model():
    model, tokens = llama(), ids()
    grads = []
    for name in ("flexkernels", "sdpa"):
        model.zero_grad()
        outputs(model, name, tokens).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_really_runs_the_kernel(monkeypatch):
    model, tokens, calls = llama(), ids(), called_ops(monkeypatch)
    outputs(model, "flexkernels", tokens, attention_mask=torch.ones_like(tokens))
    assert calls == ["attention"] * 2


@torch.no_grad()
def test_generation_with_a_cache():
    model, tokens = llama(), ids()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    texts = []
    for name in ("flexkernels", "sdpa"):
        model.set_attn_implementation(name)
        texts.append(model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


@torch.no_grad()
def test_packed_sequences():
    model, lengths = llama(), [4, 7, 3]
    sequences = [ids(1, length) for length in lengths]
    cu_seqlens = torch.tensor([0, 4, 11, 14], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = outputs(
        model, "flexkernels", torch.cat(sequences, 1), position_ids=positions, use_cache=False,
        cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=7, max_length_k=7,
    )  # fmt: skip
    alone = torch.cat([outputs(model, "sdpa", sequence) for sequence in sequences], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"attention_mask must be a bool mask of keys, .*, got bool \[1, 1, 14, 14\]"):
        outputs(model, "flexkernels", torch.cat(sequences, 1), position_ids=positions, use_cache=False)


def test_refuses_what_it_does_not_serve():
    module, x = nn.Module(), torch.randn(1, 4, 6, 16)
    forward = ours.attention_forward
    with pytest.raises(ValueError, match="dropout must be 0 with attn_implementation 'flexkernels'"):
        forward(module, x, x, x, None, dropout=0.1)
    for name in ours.UNSUPPORTED:
        with pytest.raises(ValueError, match=f"{name} must be None"):
            forward(module, x, x, x, None, **{name: 4})
    with pytest.raises(ValueError, match="query must have batch 1 beside cu_seq_lens_q, got batch 2"):
        forward(
            module,
            *[torch.cat([x, x])] * 3,
            None,
            cu_seq_lens_q=torch.tensor([0, 6]),
            cu_seq_lens_k=torch.tensor([0, 6]),
        )
    with pytest.raises(ValueError, match="must end with the queries"):
        ours.attention_mask(1, 3, 16, 0, 0, transformers.masking_utils.causal_mask_function)


@torch.no_grad()
def test_a_processor_draws_as_sample_logits():
    torch.manual_seed(0)
    model, tokens = llama(), ids(3, 5)
    settings = dict(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    run = dict(do_sample=False, max_new_tokens=4, pad_token_id=0)
    got = model.generate(tokens, logits_processor=[ours.Draw(**settings)], **run)
    # what stands before is what the next token was drawn from
    for at in range(tokens.shape[1], got.shape[1]):
        logits = model(got[:, :at])[0][:, -1].float()
        assert torch.equal(got[:, at], sample_logits(logits, offset=at, **settings))
    again = model.generate(tokens, logits_processor=[ours.Draw(**settings)], **run)
    other = model.generate(tokens, logits_processor=[ours.Draw(**settings | dict(seed=8))], **run)
    assert torch.equal(again, got) and not torch.equal(other, got)


def test_a_processor_tells_what_is_wrong():
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got 2"):
        ours.Draw(top_p=2.0)(ids(), torch.randn(2, 50))

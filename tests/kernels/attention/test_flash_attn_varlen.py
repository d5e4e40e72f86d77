"""flash_attn_varlen_func: its own conventions against plain attention, sequence by sequence."""

import gc

import pytest
import torch
from helpers import DEVICE
from one_by_one import one_by_one

from flexkernels import flash_attn_varlen_func, varlen

Q_LENGTHS, K_LENGTHS = [3, 0, 40, 1, 5], [7, 2, 17, 0, 5]


def make(heads=4, kv_heads=2, dtype=torch.float32):
    cu_q, cu_k = (
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lengths in (Q_LENGTHS, K_LENGTHS)
    )
    q = torch.randn(int(cu_q[-1]) + 2, heads, 32, dtype=dtype)
    k, v = torch.randn(2, int(cu_k[-1]) + 1, kv_heads, 32, dtype=dtype).unbind(0)
    return tuple(x.to(DEVICE) for x in (q, k, v, cu_q, cu_k))


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("causal", [False, True])
def test_is_attention_of_each_sequence(causal, scale):
    q, k, v, cu_q, cu_k = make()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, probabilities = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 40, 17, causal=causal, softmax_scale=scale, return_attn_probs=True
    )
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want_out, want_lse = one_by_one(*exact, cu_q, cu_k, causal, scale or 32**-0.5)
    want = torch.autograd.grad(want_out, exact, grad.double())
    assert probabilities is None and lse.shape == (4, len(q))
    torch.testing.assert_close(out, want_out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.T, want_lse.float(), rtol=1e-5, atol=1e-5)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-4, atol=1e-5)


def test_the_layout_is_kept_with_the_tensor_and_follows_its_values():
    *_, cu_q, cu_k = make()
    gc.collect()
    before = len(varlen._layouts)
    first = varlen._layout(cu_q, cu_k, "full")
    assert varlen._layout(cu_q, cu_k, "full") is first
    assert len(varlen._layouts) == before + 1
    cu_q[1:] -= 1
    changed = varlen._layout(cu_q, cu_k, "full")
    assert changed is not first and changed.total == first.total - 1
    assert varlen._layout(cu_q, cu_k.clone(), "full") is not changed
    del cu_q
    gc.collect()
    assert len(varlen._layouts) == before


WRONG = {
    "dropout": (dict(dropout_p=0.1), "dropout_p must be"),
    "window": (dict(window_size=(5, 0)), "window_size must be"),
    "softcap": (dict(softcap=30.0), "softcap must be"),
    "alibi": (dict(alibi_slopes=torch.ones(4)), "alibi_slopes must be"),
    "falling": (dict(cu_seqlens_q=torch.tensor([0, 5, 3])), "cu_seqlens_q must never fall"),
    "start": (dict(cu_seqlens_k=torch.tensor([1, 2, 3])), "cu_seqlens_k must run from 0"),
    "batch": (dict(cu_seqlens_k=torch.tensor([0, 3])), "cu_seqlens_k must have the shape"),
    "empty": (dict(cu_seqlens_q=torch.tensor([]).int(), cu_seqlens_k=torch.tensor([]).int()), "at least one entry"),
    "overlong": (dict(cu_seqlens_q=torch.tensor([0, 3, 99])), "q must have at least the layout's 99 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    change, message = WRONG[case]
    q, k, v, _, _ = make()
    call = dict(cu_seqlens_q=torch.tensor([0, 3, 5]), cu_seqlens_k=torch.tensor([0, 3, 5])) | change
    call = {name: x.to(DEVICE) if name.startswith("cu_") else x for name, x in call.items()}
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, k, v, **call)


@torch.inference_mode()
def test_offsets_made_in_inference_mode():
    q = torch.randn(9, 2, 16)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = flash_attn_varlen_func(q, q, q, offsets, offsets)
    # written in place, which no version tells of
    offsets[1] = 2
    changed = flash_attn_varlen_func(q, q, q, offsets, offsets)
    for got, first in ((out, 4), (changed, 2)):
        torch.testing.assert_close(
            got[:first], flash_attn_varlen_func(*[q[:first]] * 3, *[offsets.new_tensor([0, first])] * 2)
        )

"""torch's varlen attention with "flexkernels" activated: attention of each sequence, or torch's own kernel."""

import pytest
import torch
from helpers import DEVICE
from one_by_one import one_by_one

import flexkernels
from flexkernels.attention import MAX_HEAD_DIM
from flexkernels.integrations import torch_attention

registry = pytest.importorskip("torch.nn.attention.varlen")
if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of attention", allow_module_level=True)

Q_LENGTHS, K_LENGTHS = [3, 0, 40, 1, 5], [7, 2, 41, 0, 5]


@pytest.fixture
def active():
    torch_attention.register()
    torch.nn.attention.activate_flash_attention_impl("flexkernels")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def make(dtype=torch.float32, kv_heads=4):
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (Q_LENGTHS, K_LENGTHS))
    q = torch.randn(int(cu_q[-1]), 4, 32, dtype=dtype)
    k, v = torch.randn(2, int(cu_k[-1]), kv_heads, 32, dtype=dtype).unbind(0)
    return tuple(x.to(DEVICE) for x in (q, k, v, cu_q, cu_k))


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attention_and_its_gradient(active, causal, kv_heads):
    q, k, v, cu_q, cu_k = make(kv_heads=kv_heads)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    window = (-1, 0) if causal else (-1, -1)
    out, lse = registry.varlen_attn(
        q, k, v, cu_q, cu_k, 40, 41, scale=0.3, window_size=window, enable_gqa=kv_heads < 4,
        return_aux=registry.AuxRequest(lse=True), num_splits=1,
    )  # fmt: skip
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, want_lse = one_by_one(*exact, cu_q, cu_k, causal, 0.3)
    torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.T.float(), rtol=1e-5, atol=1e-5)
    for g, w in zip(got, torch.autograd.grad(want, exact, grad.double()), strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-4, atol=1e-5)


def test_it_is_this_packages_kernel(active):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k, v, cu_q, cu_k = make(dtype)
        out = registry.varlen_attn(q, k, v, cu_q, cu_k, 40, 41)
        assert torch.equal(out, flexkernels.flash_attn_varlen_func(q, k, v, cu_q, cu_k))
        into = torch.empty_like(q)
        registry.varlen_attn_out(into, q, k, v, cu_q, cu_k, 40, 41, window_size=(-1, 0))
        assert torch.equal(into, flexkernels.flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True))


OTHERS = {
    "window": dict(window_size=(5, 0)),
    "window ahead": dict(window_size=(-1, 3)),
    "lengths used": dict(seqused_k=torch.tensor([1] * 5, dtype=torch.int32, device=DEVICE)),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="torch has these on a GPU")
@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_served_is_refused_where_torch_has_no_kernel(active, case):
    q, k, v, cu_q, cu_k = make()
    with pytest.raises(ValueError, match="_flash_attention_forward on CPU must have packed sequences"):
        registry.varlen_attn(q, k, v, cu_q, cu_k, 40, 41, **OTHERS[case])
    with pytest.raises(ValueError, match="on CPU must have packed sequences"):
        torch.ops.aten._flash_attention_forward(*[q[None]] * 3, None, None, 49, 49, 0.0, False, False)
    for wrong in (q.double(), q.new_empty(*q.shape[:2], MAX_HEAD_DIM + 1)):
        with pytest.raises(ValueError, match=f"of float32, bfloat16 or float16 and a head_dim up to {MAX_HEAD_DIM}"):
            registry.varlen_attn(*[wrong] * 3, cu_q, cu_q, 40, 40)


@pytest.mark.skipif(DEVICE != "cpu", reason="takes the place of torch's kernel")
@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_served_goes_to_the_kernel_that_was_there(case):
    calls = []

    def theirs(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options):
        calls.append({name: value for name, value in options.items() if value is not None})
        return torch.full_like(q, 7), q.new_zeros(q.shape[1], len(q)), *[q.new_zeros(2)] * 3

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", theirs, "CPU")
    torch_attention.register()
    torch.nn.attention.activate_flash_attention_impl("flexkernels")
    try:
        q, k, v, cu_q, cu_k = make()
        assert (registry.varlen_attn(q, k, v, cu_q, cu_k, 40, 41, **OTHERS[case]) == 7).all() and len(calls) == 1
        assert (registry.varlen_attn(q, k, v, cu_q, cu_k, 40, 41) != 7).any() and len(calls) == 1
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        assert (registry.varlen_attn(q, k, v, cu_q, cu_k, 40, 41) == 7).all()
        library._destroy()


def test_restored_torch_has_its_own_again(active):
    assert torch.nn.attention.current_flash_attention_impl() == "flexkernels"
    torch.nn.attention.restore_flash_attention_impl()
    if DEVICE == "cpu":
        q, k, v, cu_q, cu_k = make()
        with pytest.raises(NotImplementedError):
            registry.varlen_attn(q, k, v, cu_q, cu_k, 40, 41)
    torch.nn.attention.activate_flash_attention_impl("flexkernels")


def test_a_torch_without_the_registry(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"torch must have torch\.nn\.attention\.register_flash"):
        torch_attention.register()

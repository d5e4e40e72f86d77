"""attention: every mask, dtype and backend against dense float64 attention, and how it behaves as a PyTorch op."""

import pytest
import torch
from helpers import assert_accurate

import flexkernels
from flexkernels import SequenceLayout, attention, attention_ref

FLEX = {"prefix_to_register": "none", "register_to_prefix": "none", "register_to_register": "causal"}
MASKS = {
    "full": ("full", None),
    "causal": ("causal", None),
    "frame_causal": ("frame_causal", None),
    "frame_causal_prefix": ("frame_causal_prefix", None),
    "flexible": ("frame_causal_prefix", FLEX),
}
# ragged frames, an empty sequence, an empty frame, frames without prefix or registers, equal neighbours
FRAMES = [[(7, 5), (3, 0), (0, 0), (0, 4)], [], [(1, 0)], [(4, 3), (4, 3)], [(4, 3), (4, 3)], [(17, 16)] * 3]
BACKENDS = [name for name in ("reference", "cpu") if flexkernels.available_backends()[name] is None]


def make(mask="frame_causal", frames=FRAMES, heads=3, kv_heads=3, head_dim=32, dtype=torch.float32, extra=0, seed=0):
    name, cross = MASKS[mask]
    layout = SequenceLayout(frames, name, cross)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h: torch.randn(layout.total + extra, h, head_dim, generator=generator).to(dtype)  # noqa: E731
    return draw(heads), draw(kv_heads), draw(kv_heads), layout


def float64(q, k, v, layout, **options):
    return attention_ref(q.double(), k.double(), v.double(), layout, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_against_float64(backend, dtype, mask):
    q, k, v, layout = make(mask, dtype=dtype)
    weight = torch.randn(len(q)).abs().log()
    with flexkernels.backend(backend):
        got, lse = attention(q, k, v, layout, key_log_weight=weight, return_lse=True)
    want, want_lse = float64(q, k, v, layout, key_log_weight=weight, return_lse=True)
    assert got.dtype == dtype
    assert lse.dtype == torch.float32
    plain = attention_ref(q, k, v, layout, key_log_weight=weight)
    assert_accurate(got, plain, want)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_grouped_heads_and_scale(backend, mask):
    q, k, v, layout = make(mask, heads=6, kv_heads=2)
    with flexkernels.backend(backend):
        got = attention(q, k, v, layout, softmax_scale=0.3)
    torch.testing.assert_close(got, float64(q, k, v, layout, softmax_scale=0.3).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 17, 129, 151, 700])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_odd_lengths(backend, mask, length):
    q, k, v, layout = make(mask, frames=[[(length, 0)], [(3, 0)]], heads=2, kv_heads=2)
    with flexkernels.backend(backend):
        got = attention(q, k, v, layout)
    torch.testing.assert_close(got, float64(q, k, v, layout).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_equals_one_by_one(backend, mask):
    """Whatever stands beside a sequence, and in which slot: the same bits in the same group, close bits otherwise."""
    q, k, v, layout = make(mask)
    bounds = layout.cu_seqlens.tolist()
    with flexkernels.backend(backend):
        packed = attention(q, k, v, layout)
        for i, frames in enumerate(FRAMES):
            rows = slice(bounds[i], bounds[i + 1])
            alone = attention(q[rows], k[rows], v[rows], SequenceLayout([frames], *MASKS[mask]))
            torch.testing.assert_close(packed[rows], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_is_a_number_of_copies(backend):
    """One key of weight log(m) is m identical keys."""
    q, k, v, layout = make("full", frames=[[(6, 0)]], heads=2, kv_heads=2)
    copies = torch.tensor([1, 1, 1, 1, 1, 5])
    many_k, many_v = k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)
    many_q = q.repeat_interleave(copies, 0)
    with flexkernels.backend(backend):
        one = attention(q, k, v, layout, key_log_weight=copies.float().log())
        many = attention(many_q, many_k, many_v, SequenceLayout([[(10, 0)]], "full"))
    torch.testing.assert_close(one, many[:6], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_keep_their_precision_beside_bfloat16(backend):
    """Weights of collapsed registers, log(1) to log(256): rounding them to bfloat16 would triple the error."""
    q, k, v, layout = make("frame_causal", frames=[[(64, 33)] * 3], head_dim=64, dtype=torch.bfloat16)
    weight = torch.randint(1, 257, (len(q),)).float().log()
    with flexkernels.backend(backend):
        got = attention(q, k, v, layout, key_log_weight=weight).double()
    exact = float64(q, k, v, layout, key_log_weight=weight)
    plain = attention_ref(q, k, v, layout, key_log_weight=weight).double()
    assert (got - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_layout_are_zero(backend):
    q, k, v, layout = make(extra=5)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    with flexkernels.backend(backend):
        out, lse = attention(q, k, v, layout, return_lse=True)
        out.sum().backward()
    assert (out[layout.total :] == 0).all()
    assert (lse[layout.total :] == float("-inf")).all()
    for x in (q, k, v):
        assert (x.grad[layout.total :] == 0).all()
        assert torch.isfinite(x.grad).all()


# a batch of queries, and of other keys: more, fewer, none, and frames that the queries do not have
KEYS = [[(5, 6), (3, 1), (2, 2)], [(4, 4)], [(9, 3)], [], [(4, 3)] * 3, [(8, 8)] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_cross_attention(backend, mask):
    """Keys of other lengths: output, lse and gradients against float64; a row without keys is zero."""
    layout = SequenceLayout(FRAMES, *MASKS[mask], key_frames=KEYS)
    q, grad = torch.randn(2, layout.total, 4, 32)
    k, v = torch.randn(2, layout.total_k + 3, 2, 32)
    weight = torch.randn(len(k))

    def run(function, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = function(*leaves, layout, key_log_weight=weight, return_lse=True)
        out.backward(grad.to(out.dtype))
        return out.detach(), lse.detach(), *(x.grad for x in leaves)

    with flexkernels.backend(backend):
        got = run(attention, q, k, v)
    want = run(attention_ref, q.double(), k.double(), v.double())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=1e-5)
    unseen = ~layout.visible().any(1)
    assert (got[0][unseen] == 0).all() and (got[1][unseen] == -torch.inf).all() and unseen.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_and_repeatability(backend):
    q, k, v, layout = make("frame_causal_prefix")
    merged = torch.stack([q, k, v], 1)
    with flexkernels.backend(backend):
        got = attention(*merged.unbind(1), layout)
        assert torch.equal(got, attention(q, k, v, layout))
        assert torch.equal(got, attention(q, k, v, layout))


def test_empty_batch():
    q, k, v, layout = make(frames=[[], []])
    out, lse = attention(q, k, v, layout, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_against_float64(backend, dtype, mask):
    q, k, v, layout = make(mask, heads=4, kv_heads=2, dtype=dtype)
    weight = torch.randn(len(q))
    grad = torch.randn(q.shape).to(dtype)

    def gradients(function, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        function(*leaves, layout, key_log_weight=weight).backward(grad.to(leaves[0].dtype))
        return [x.grad for x in leaves]

    with flexkernels.backend(backend):
        got = gradients(attention, q, k, v)
    want = gradients(attention_ref, q.double(), k.double(), v.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        error = float((g.double() - w).norm() / w.norm())
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-6), error


def test_one_tensor_as_q_k_and_v():
    q, _, _, layout = make("causal", frames=[[(9, 0)], [(5, 0)]])
    x, y = q.clone().requires_grad_(), q.double().requires_grad_()
    torch.compile(lambda a: attention(a, a, a, layout), fullgraph=True, backend="aot_eager")(
        x
    ).square().sum().backward()
    attention_ref(y, y, y, layout).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-4, atol=1e-4)


def test_opcheck():
    q, k, v, layout = make("frame_causal_prefix", frames=[[(2, 3), (1, 2)]], heads=2, kv_heads=2, head_dim=8)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    for weight in (None, torch.randn(len(q))):
        arguments = (q, k, v, list(layout.tensors), weight, 3, list(layout.cross), 0.5)
        torch.library.opcheck(torch.ops.flexkernels.attention.default, arguments)
    out, lse = torch.ops.flexkernels.attention(*(x.detach() for x in (q, k, v)), *arguments[3:])
    plain = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.flexkernels.attention_backward.default, (*plain, *arguments[3:]))


def test_compile_without_recompiling_for_new_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def run(q, k, v, layout):
        return torch.ops.flexkernels.attention(q, k, v, layout, None, 2, [1, 1, 1, 1], 0.2)[0]

    for frames in ([[(4, 3)] * 2], [[(5, 3)] * 3, [(2, 2)] * 2], [[(9, 1)], [(3, 3)], [(2, 8)]]):
        q, k, v, layout = make(frames=frames)
        got = run(q, k, v, list(layout.tensors))
        torch.testing.assert_close(got, attention(q, k, v, layout, softmax_scale=0.2))
    assert counter.frame_count <= 2


def test_no_dense_mask_in_memory():
    """8,192 tokens: a dense float mask alone would be 256 MB; the CPU path stays far below."""
    if "cpu" not in BACKENDS:
        pytest.skip("no C++ build: only the dense reference")
    layout = SequenceLayout([[(256, 256)] * 16], "frame_causal_prefix")
    q = torch.randn(layout.total, 1, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(q, q, q, layout)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 32e6, largest


WRONG = {
    "a list": (lambda q, k, v, layout: (q.tolist(), k, v, layout), TypeError, "q must be a torch.Tensor"),
    "float64": (lambda q, k, v, layout: (q.double(), k, v, layout), TypeError, "q must be float32"),
    "mixed dtypes": (lambda q, k, v, layout: (q, k.half(), v, layout), TypeError, "like q"),
    "two dimensions": (lambda q, k, v, layout: (q[0], k, v, layout), ValueError, "q must have 3 dimensions"),
    "fewer keys": (lambda q, k, v, layout: (q, k[1:], v[1:], layout), ValueError, "k must have at least the layout's"),
    "other head_dim": (lambda q, k, v, layout: (q, k[..., 1:], v[..., 1:], layout), ValueError, "k must have head_dim"),
    "other v": (lambda q, k, v, layout: (q, k, v[:, :1], layout), ValueError, "v must have the shape"),
    "head counts": (lambda q, k, v, layout: (q, k[:, :2], v[:, :2], layout), ValueError, "multiple of k's 2 heads"),
    "longer layout": (lambda q, k, v, layout: (q[1:], k[1:], v[1:], layout), ValueError, "at least the layout's"),
    "device": (lambda q, k, v, layout: (q.to("meta"), k, v, layout), ValueError, "q must be on cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        attention(*change(*make()))


def test_wrong_weight_and_head_dim():
    q, k, v, layout = make()
    with pytest.raises(ValueError, match="key_log_weight must have the shape"):
        attention(q, k, v, layout, key_log_weight=torch.zeros(3))
    with pytest.raises(TypeError, match="key_log_weight must be float32"):
        attention(q, k, v, layout, key_log_weight=torch.zeros(len(q), dtype=torch.float64))
    with pytest.raises(ValueError, match="key_log_weight must be finite"):
        attention(q, k, v, layout, key_log_weight=torch.full((len(q),), -torch.inf))
    wide = torch.randn(len(q), 1, 257)
    with pytest.raises(ValueError, match="head_dim must lie between 1 and 256"):
        attention(wide, wide, wide, layout)

"""The C++ backward of attention: accuracy against float64 at odd sizes, every ISA level, and what it refuses."""

import pytest
import torch
from helpers import repeat_at_level

import flexkernels
from flexkernels import SequenceLayout, attention, attention_ref
from flexkernels.layout import LayoutTensors

pytestmark = pytest.mark.skipif(flexkernels.available_backends()["cpu"] is not None, reason="no C++ build")
ops = torch.ops.flexkernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# several blocks of 64 rows and of 512 keys, and their edges; one token; none
FRAMES = [[(90, 39)] * 5, [], [(64, 1)] * 2, [(1, 0)], [(2, 5), (0, 0), (17, 30)]]


def gradients(function, grad, layout, tensors, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, layout, **options)
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def check(tensors, layout, **options):
    grad = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    with flexkernels.backend("cpu"):
        ours = gradients(attention, grad, layout, tensors, **options)
    with flexkernels.backend("reference"):
        # products in the tensors' dtype, as every kernel has them
        plain = gradients(attention, grad, layout, tensors, **options)
    exact = gradients(attention_ref, grad, layout, [x.double() for x in tensors], **options)
    lse = attention(*tensors, layout, return_lse=True, **options)[1]
    # weights are exp(score - lse) of the forward's float32 lse, and as wrong as its last bit
    rounding = torch.finfo(torch.float32).eps / 2 * lse[lse.isfinite()].abs().max()
    for got, formula, want in zip(ours, plain, exact, strict=True):
        assert got.dtype == formula.dtype
        error, allowed = ((x.double() - want).norm() for x in (got, formula))
        assert error <= 2 * allowed + rounding * want.norm(), (float(error), float(allowed), float(want.norm()))


def draw(layout, heads, kv_heads, head_dim, dtype):
    sizes = [(layout.total, heads), (layout.total_k, kv_heads), (layout.total_k, kv_heads)]
    return [torch.randn(*size, head_dim).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal", "frame_causal", "frame_causal_prefix"])
def test_masks(mask, dtype):
    layout = SequenceLayout(FRAMES, mask)
    check(draw(layout, 2, 2, 32, dtype), layout)
    check(draw(layout, 4, 2, 16, dtype), layout, key_log_weight=torch.randn(layout.total))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 33, 64, 80, 256])
def test_head_dims(head_dim, dtype):
    layout = SequenceLayout([[(9, 4)] * 3, [(70, 3)]], "frame_causal_prefix")
    check(draw(layout, 2, 1, head_dim, dtype), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_scales(scale, dtype):
    layout = SequenceLayout.from_lengths([65, 3], "causal")
    check(draw(layout, 2, 2, 20, dtype), layout, softmax_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_keys(dtype):
    """More keys than queries, none, and queries of which some see nothing."""
    layout = SequenceLayout.from_lengths([3, 70, 5, 0, 9], key_lengths=[600, 33, 0, 4, 9])
    check(draw(layout, 2, 2, 24, dtype), layout)
    layout = SequenceLayout.from_lengths([70, 5], "causal", key_lengths=[33, 1])
    check(draw(layout, 2, 2, 24, dtype), layout)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_other_isa_levels(level):
    repeat_at_level(__file__, "test_masks or test_head_dims or test_scales or test_other_keys", level)


def test_strided_tensors_and_any_number_of_threads():
    layout = SequenceLayout(FRAMES, "frame_causal_prefix")
    merged = torch.randn(layout.total, 3, 4, 32)
    grad = torch.randn(layout.total, 5, 40)[:, :4, 4:36]
    whole = [x.contiguous() for x in merged.unbind(1)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = gradients(attention, grad.contiguous(), layout, whole)
        torch.set_num_threads(4)
        again = gradients(attention, grad, layout, merged.unbind(1))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


def arguments(layout, tensors):
    out, lse = ops.attention(*tensors, *layout.arguments[:1], None, *layout.arguments[1:], 0.2)
    return [torch.randn_like(out), *tensors, out, lse, *layout.arguments[:1], None, *layout.arguments[1:], 0.2]


def test_every_element_of_the_gradients_is_written():
    """What the op allocates is full of NaN, of which none survives, also where no query looks."""
    layout = SequenceLayout(FRAMES, "frame_causal_prefix")
    tensors = [torch.randn(layout.total + 6, 2, 32) for _ in range(3)]
    for grad in ops.attention_backward(*arguments(layout, tensors)):
        assert torch.isfinite(grad).all() and (grad[layout.total :] == 0).all()
        assert (grad[: layout.total] != 0).any()


def changed(name, change):
    """A layout list with one tensor of another value."""
    at = LayoutTensors._fields.index(name)
    return lambda layout: [change(x) if i == at else x for i, x in enumerate(layout)]


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, lambda x: x[1:], "grad_out must have size 35 in dimension 0, got 34"),
        (0, lambda x: x.half(), "grad_out must have dtype"),
        (0, lambda x: x[..., ::2], "grad_out must have size 8 in dimension 2"),
        (4, lambda x: x[1:], "out must have size 35"),
        (4, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "out must be contiguous"),
        (5, lambda x: x[1:], "lse must have"),
        (6, changed("cu_seqlens", lambda x: x + 1), "cu_seqlens must start at 0"),
        (6, changed("tiles", lambda x: torch.cat([x[:, :1] + 7, x[:, 1:]], 1)), "tiles must ascend among 2 sequences"),
    ],
)
def test_what_the_op_refuses(at, wrong, message):
    layout = SequenceLayout([[(9, 8)], [(9, 9)]], "frame_causal_prefix")
    given = arguments(layout, draw(layout, 2, 2, 8, torch.float32))
    given[at] = wrong(given[at])
    with pytest.raises(RuntimeError, match=message):
        ops.attention_backward(*given)

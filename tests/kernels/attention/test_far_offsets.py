"""Elements that lie more than 2**31 apart: views into one buffer of which only the pages that are used exist."""

import pytest
import torch
from helpers import on_every_backend

import flexkernels
from flexkernels import SequenceLayout

ROWS, HEADS, HEAD_DIM = 70, 2, 16
# rows of 2**31 / 58 elements: the second sequence is beyond; or the second head is
STRIDES = {"rows": (2**31 // 58 // 64 * 64, HEAD_DIM), "heads": (HEAD_DIM, 2**31 + 64)}


@pytest.fixture(params=STRIDES)
def far(request):
    """far(i, values): a view with the values of [ROWS, HEADS, HEAD_DIM], the i-th of five beside each other."""
    row, head = STRIDES[request.param]
    span = 64 * HEAD_DIM * HEADS if row > HEAD_DIM else ROWS * HEAD_DIM
    size = (ROWS - 1) * row + (HEADS - 1) * head + 6 * span
    buffers = {}

    def place(i, values):
        if values.dtype not in buffers:
            # filling it would make all of its pages
            torch.utils.deterministic.fill_uninitialized_memory = False
            buffers[values.dtype] = torch.empty(size, dtype=values.dtype)
            torch.utils.deterministic.fill_uninitialized_memory = True
        view = buffers[values.dtype].as_strided(values.shape, (row, head, 1), i * span)
        return view.copy_(values)

    return place


def make_layout():
    layout = SequenceLayout([[(40, 20)], [(3, 7)]], "frame_causal_prefix")
    tensors, *mask = layout.arguments
    # copies, which the emulator knows of
    layout.arguments = [x.clone() for x in tensors], *mask
    return layout


def on_cpu(place):
    if place[1] != "cpu":
        pytest.skip("a GPU has no memory that is not there")


@on_every_backend
def test_attention(place, far):
    on_cpu(place)
    layout = make_layout()
    near = torch.randn(3, ROWS, HEADS, HEAD_DIM).bfloat16()
    with flexkernels.backend(place[0]):
        want = flexkernels.attention(*near, layout, return_lse=True)
        got = flexkernels.attention(*(far(i, x) for i, x in enumerate(near)), layout, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_every_backend
def test_gradients(place, far):
    on_cpu(place)
    if place[0] == "cuda":
        pytest.skip("the gradient has no CUDA kernel")
    layout = make_layout()
    near = torch.randn(4, ROWS, HEADS, HEAD_DIM).bfloat16().unbind()
    results = []
    for *tensors, grad in (near, [far(i, x) for i, x in enumerate(near)]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        with flexkernels.backend(place[0]):
            results.append(torch.autograd.grad(flexkernels.attention(*leaves, layout), leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding(place, dtype, far):
    """Caches [batch, heads, tokens, head_dim] of one sequence."""
    on_cpu(place)
    k, v = torch.randn(2, ROWS, HEADS, HEAD_DIM).to(dtype)
    q, length = torch.randn(1, 2, HEADS, HEAD_DIM).to(dtype), torch.tensor([ROWS], dtype=torch.int32)
    caches = (k, v), (far(0, k), far(1, v))
    with flexkernels.backend(place[0]):
        want, got = (
            flexkernels.decode_attention(q, *(x.transpose(0, 1)[None] for x in pair), length, return_lse=True)
            for pair in caches
        )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

"""Forward and gradient of every backend: one tensor three times, a sequence alone and beside NaN, again and again."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import on_every_backend

import flexkernels
from flexkernels import SequenceLayout

FRAMES = [[(9, 4)], [], [(20, 7)]]
TOTAL = 40


def run(place, q, k, v, frames, weight=None):
    """out and, where there is one, the gradients of a loss."""
    layout = SequenceLayout(frames, "frame_causal_prefix", device=place[1])
    tensors, *mask = layout.arguments
    # copies, which the emulator knows of
    layout.arguments = [x.clone() for x in tensors], *mask
    leaves = [x.detach().to(place[1]).requires_grad_(place[0] != "cuda") for x in (q, k, v)]
    with flexkernels.backend(place[0]):
        out = flexkernels.attention(*leaves, layout, key_log_weight=None if weight is None else weight.to(place[1]))
        grads = torch.autograd.grad(out.square().sum(), leaves) if out.requires_grad else ()
    return [x.detach().cpu() for x in (out, *grads)]


def draw():
    return torch.randn(3, TOTAL, 1, 16).bfloat16()


@on_every_backend
def test_one_tensor_as_q_k_and_v(place):
    x = draw()[0].to(place[1]).requires_grad_(place[0] != "cuda")
    want = run(place, x, x, x, FRAMES)
    layout = SequenceLayout(FRAMES, "frame_causal_prefix", device=place[1])
    tensors, *mask = layout.arguments
    layout.arguments = [t.clone() for t in tensors], *mask
    with flexkernels.backend(place[0]):
        out = flexkernels.attention(x, x, x, layout)
    assert torch.equal(out.detach().cpu(), want[0])
    if out.requires_grad:
        with flexkernels.backend(place[0]):
            grad = torch.autograd.grad(out.square().sum(), x)[0].cpu()
        torch.testing.assert_close(grad.float(), sum(g.float() for g in want[1:]), rtol=2e-2, atol=2e-2)


@on_every_backend
def test_alone_beside_others_and_beside_nan(place):
    if place[0] == "reference":
        pytest.skip("sums of dense products depend on their size")
    (q, k, v), weight = draw(), torch.randn(TOTAL)
    together = run(place, q, k, v, FRAMES, weight)
    assert all(torch.equal(a, b) for a, b in zip(run(place, q, k, v, FRAMES, weight), together, strict=True))
    bounds = SequenceLayout(FRAMES, "frame_causal_prefix").cu_seqlens.tolist()
    for (begin, end), frames in zip(pairwise(bounds), FRAMES, strict=True):
        if begin == end:
            continue
        rows, others = slice(begin, end), torch.ones(TOTAL, 1, 1, dtype=torch.bool)
        others[rows] = False
        beside = run(place, *(x.masked_fill(others, math.nan) for x in (q, k, v)), FRAMES, weight)
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(beside, together, strict=True))
        alone = run(place, *(x[rows].clone() for x in (q, k, v)), [frames], weight[rows].clone())
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))

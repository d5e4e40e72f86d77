"""A linear layer as stock PyTorch runs it."""

import torch.nn.functional as F


def linear(x, weight):
    return F.linear(x, weight)


def dequantized_linear(x, weight, scale):
    """int8 weight [n, k], scale [n]: widened to x's dtype, then multiplied."""
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


def swiglu(x, weight):
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up

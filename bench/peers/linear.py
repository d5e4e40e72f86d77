"""A linear layer as stock PyTorch runs it."""

import torch.nn.functional as F


def linear(x, weight):
    """Source: torch.nn.functional.linear, PyTorch documentation."""
    return F.linear(x, weight)


def dequantized_linear(x, weight, scale):
    """int8 weight [n, k], scale [n]: widened to x's dtype, then multiplied.

    Source: the weight-only int8 linear layer of pytorch-labs/gpt-fast (quantize.py), as a formula.
    """
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


def swiglu(x, weight):
    """Source: arXiv 2002.05202, equation 6, both matrices in one product."""
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


def normed_linear(x, norm, weight):
    """Source: arXiv 1910.07467, equation 4, then torch.nn.functional.linear."""
    return F.linear(F.rms_norm(x, norm.shape, norm, 1e-6), weight)

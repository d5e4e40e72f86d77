"""Norms, modulation and SwiGLU as model code writes them: tables expanded to rows, one op after another."""

import torch.nn.functional as F


def adaln_norm(x, shift, scale, segment):
    """Source: adaLN of arXiv 2212.09748, section 3.2, by torch.nn.functional.layer_norm."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[segment]) + shift[segment]


def gated_residual(x, y, gate, segment):
    """Source: the gate of adaLN-Zero in arXiv 2212.09748, section 3.2."""
    return x + gate[segment] * y


def gated_residual_adaln_norm(x, y, gate, shift, scale, segment):
    """Source: the two above, one after the other, as in a block of arXiv 2212.09748."""
    x = gated_residual(x, y, gate, segment)
    return x, adaln_norm(x, shift, scale, segment)


def rms_norm(x, weight, residual):
    """Source: arXiv 1910.07467, by torch.nn.functional.rms_norm, after the residual sum."""
    x = x + residual
    return x, F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def swiglu(x):
    """Source: arXiv 2002.05202, equation 6, without its matrices."""
    a, b = x.chunk(2, -1)
    return F.silu(a) * b

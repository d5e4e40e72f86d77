"""Norms, modulation and SwiGLU as model code writes them: tables expanded to rows, one op after another."""

import torch.nn.functional as F


def adaln_norm(x, shift, scale, segment):
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[segment]) + shift[segment]


def gated_residual_adaln_norm(x, y, gate, shift, scale, segment):
    x = x + gate[segment] * y
    return x, adaln_norm(x, shift, scale, segment)


def rms_norm(x, weight, residual):
    x = x + residual
    return x, F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def swiglu(x):
    a, b = x.chunk(2, -1)
    return F.silu(a) * b

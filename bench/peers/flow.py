"""Guided solver steps on [B, C, T, H, W]."""

import torch

DIMS = (-3, -2, -1)


def apg(v_cond, v_uncond, scale, threshold, eta, projection=torch.float64):
    """Adaptive projected guidance per channel; the published code projects in float64.

    Source: arXiv 2410.02416, algorithm 1, which prints its PyTorch code.
    """
    d = v_cond - v_uncond
    if threshold > 0:
        norm = d.norm(p=2, dim=DIMS, keepdim=True)
        d = d * torch.minimum(torch.ones_like(norm), threshold / norm)
    wide = d.to(projection)
    unit = torch.nn.functional.normalize(v_cond.to(projection), dim=DIMS)
    parallel = (wide * unit).sum(DIMS, keepdim=True) * unit
    update = (wide - parallel).to(d.dtype) + eta * parallel.to(d.dtype)
    return v_cond + (scale - 1) * update


def apg_step(x, v_cond, v_uncond, dt, scale, threshold, eta, projection=torch.float64):
    """Source: the Euler step of arXiv 2209.03003, its velocity guided by `apg`."""
    return x + dt * apg(v_cond, v_uncond, scale, threshold, eta, projection)


def apg_ab2_step(x, v_cond, v_uncond, past, b, past_b, scale, threshold, eta):
    """x_next and the guided velocity, which the next step looks back at.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.1, equation 1.5 with k = 2.
    """
    v = apg(v_cond, v_uncond, scale, threshold, eta)
    return x + b * v + past_b * past, v


def cfg_step(x, v_cond, v_uncond, dt, scale):
    """Source: arXiv 2207.12598, equation 6 in the form v_u + s (v_c - v_u)."""
    return x + dt * (v_uncond + scale * (v_cond - v_uncond))

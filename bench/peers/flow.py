"""Guided Euler steps on [B, C, T, H, W] by the formulas of arXiv 2207.12598 and 2410.02416."""

import torch

DIMS = (-3, -2, -1)


def apg_step(x, v_cond, v_uncond, dt, scale, threshold, eta, projection=torch.float64):
    """Adaptive projected guidance per channel; the published code projects in float64."""
    d = v_cond - v_uncond
    if threshold > 0:
        norm = d.norm(p=2, dim=DIMS, keepdim=True)
        d = d * torch.minimum(torch.ones_like(norm), threshold / norm)
    wide = d.to(projection)
    unit = torch.nn.functional.normalize(v_cond.to(projection), dim=DIMS)
    parallel = (wide * unit).sum(DIMS, keepdim=True) * unit
    update = (wide - parallel).to(d.dtype) + eta * parallel.to(d.dtype)
    return x + dt * (v_cond + (scale - 1) * update)


def cfg_step(x, v_cond, v_uncond, dt, scale):
    return x + dt * (v_uncond + scale * (v_cond - v_uncond))

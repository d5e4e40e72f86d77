"""`FSQ` of vector_quantize_pytorch, alone or inside `ResidualFSQ` and any other module: the rounding, the codes and the
indices come from one kernel, and so do the codes of given indices.

Outputs keep the original's dtypes: codes that of the input, indices int32, codes of indices float32.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch

from .. import checks
from ..fsq import MAX_DIMS, MAX_LEVEL, fsq_dequantize, fsq_quantize
from . import Change, is_a

CLASS = "vector_quantize_pytorch.finite_scalar_quantization.FSQ"
# what is replaced, and what a subclass must not have changed for that
REPLACED = ("forward", "_indices_to_codes")
FORMULA = ("bound", "symmetry_preserving_bound", "quantize", "codes_to_indices", "indices_to_level_indices")


def knows(model: Any) -> bool:
    return is_a(model, CLASS)


def accelerate(model: Any) -> Change:
    """Replaces `forward` and `indices_to_codes` of one FSQ.

    Left to the original: float64 inputs; symmetric levels in a low precision that `allowed_dtypes` or
    `force_quantization_f32=False` asks for, since there the rounding itself is done in it; indices of codebooks so
    large that the original's float32 sum is inexact; the random numbers of noise dropout. A whole FSQ is left when its
    levels are beyond what `fsq_quantize` takes, or a subclass or an attribute has changed its formula.
    """
    levels = tuple(model._levels.tolist())
    reason = _refusal(model, levels)
    if reason is not None:
        return Change([], [f"{type(model).__name__} ({reason})"], lambda: None)
    model.forward = functools.partial(_forward, model, levels)
    model._indices_to_codes = functools.partial(_indices_to_codes, model, levels)
    left = ["float64 inputs"]
    if model.preserve_symmetry:
        left += ["low precision without force_quantization_f32", "noise dropout"]
    if not _exact(levels):
        left.append("codes_to_indices")
    return Change([f"{type(model).__name__}.forward", f"{type(model).__name__}.indices_to_codes"], left, _undo(model))


def _undo(model):
    def undo():
        for name in REPLACED:
            delattr(model, name)

    return undo


def _refusal(model, levels: tuple[int, ...]) -> str | None:
    if len(levels) > MAX_DIMS or not all(2 <= level <= MAX_LEVEL for level in levels):
        return f"more than {MAX_DIMS} levels, or one outside 2 to {MAX_LEVEL}"
    original = next(base for base in type(model).__mro__ if f"{base.__module__}.{base.__qualname__}" == CLASS)
    for name in (*REPLACED, *FORMULA):
        if name in vars(model) or getattr(type(model), name) is not getattr(original, name):
            return f"{name} is not the package's own"
    return None


def _exact(levels: tuple[int, ...]) -> bool:
    """Whether the original's float32 sum over level * basis is sure to round to the right index.

    In units of 2**-24: a level has an error of at most 6 L, so that the terms' errors add up to 12 times the codebook,
    and each addition rounds by at most the codebook.
    """
    return math.prod(levels) * (len(levels) + 12) < 2**23


def _forward(fsq, levels: tuple[int, ...], z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    moved = z.ndim >= 4 or fsq.channel_first
    if moved:
        z = z.movedim(1, -1)
        batch, *space, _ = z.shape
        z = z.reshape(batch, math.prod(space), z.shape[-1])
    if z.shape[-1] != fsq.dim:
        checks.reject("z", f"have {fsq.dim} features", z.shape[-1])
    # [b, n, codebooks, D]
    z = fsq.project_in(z).unflatten(-1, (fsq.num_codebooks, len(levels)))
    if fsq.orthogonal_rotation:
        z = z @ fsq.orthogonal_rot
    full = torch.autocast("cuda", enabled=False) if fsq.force_quantization_f32 else contextlib.nullcontext()
    with full:
        codes, indices = _quantize(fsq, levels, z)
        codes = fsq.maybe_apply_noise(codes)
        if fsq.orthogonal_rotation:
            codes = codes @ fsq.orthogonal_rot.t()
        codes = codes.flatten(-2).to(z.dtype)
    out = fsq.project_out(codes)
    if moved:
        out = out.reshape(batch, *space, out.shape[-1]).movedim(-1, 1)
        indices = None if indices is None else indices.reshape(batch, *space, fsq.num_codebooks)
    if indices is not None and not fsq.keep_num_codebooks_dim:
        indices = indices.squeeze(-1)
    return out, indices


def _quantize(fsq, levels: tuple[int, ...], z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes like z, in float32 where they are worked with further, and int32 indices [b, n, codebooks] or None."""
    widened = fsq.force_quantization_f32 and z.dtype not in fsq.allowed_dtypes
    # the shift of unsymmetric levels is float32 and carries a low precision along, whatever is allowed
    carried = z.dtype in checks.FLOATS and not fsq.preserve_symmetry
    if not (z.dtype == torch.float32 or widened or carried):
        codes = fsq.quantize(z)
        return codes, fsq.codes_to_indices(codes) if fsq.return_indices else None
    exact, noisy = _exact(levels), fsq.training and fsq.noise_dropout > 0
    if noisy or fsq.orthogonal_rotation or not exact or z.dtype not in checks.FLOATS:
        z = z.float()
    codes, indices = fsq_quantize(
        z,
        levels,
        symmetric=fsq.preserve_symmetry,
        clamp=fsq.bound_hard_clamp,
        ids=fsq.return_indices and exact,
        ids_dtype=torch.int32,
    )
    if fsq.return_indices and not exact:
        indices = fsq.codes_to_indices(codes)
    return codes, indices


def _indices_to_codes(fsq, levels: tuple[int, ...], indices: torch.Tensor) -> torch.Tensor:
    codebook = math.prod(levels)
    if indices.dtype not in checks.INTEGERS or codebook > torch.iinfo(torch.int32).max:
        return type(fsq)._indices_to_codes(fsq, indices)
    # the original lets an index outside the codebook wrap around
    return fsq_dequantize(indices.remainder(codebook), levels, symmetric=fsq.preserve_symmetry)

"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): `fsq_quantize`, `fsq_dequantize` and their references.

round(tanh(.)) never falls, so a level is the number of float32 thresholds below z. The kernels count thresholds, which
are found once per level set; they need no transcendental function and agree bit for bit with the float32 formula. The
same holds of the variants, which other thresholds and a table of codes serve.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import checks, legacy

# dtypes of ids, and how many ids each takes
IDS = {torch.int64: 2**63 - 1, torch.int32: 2**31 - 1, torch.uint16: 2**16}
MAX_LEVEL = 256
MAX_DIMS = 16


class Form(NamedTuple):
    """Which formula: levels symmetric about 0 or those of the paper; tanh or a clamp to [-1, 1]."""

    symmetric: bool = False
    clamp: bool = False


PAPER = Form()


def fsq_quantize(
    z: torch.Tensor,
    levels: Sequence[int],
    *,
    symmetric: bool = False,
    clamp: bool = False,
    codes: bool = True,
    ids: bool = True,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rounds every component of `z` to one of its levels; differentiable by the straight-through gradient.

    z: [..., D] float32, bfloat16 or float16, with D = len(levels); the arithmetic is that of float32.
    levels: D ints (at most 16), each from 2 to 256.
    symmetric: levels spread evenly over [-1, 1] (arXiv 2411.19842, section 3.2), codes 2 / (L - 1) * level - 1.
    clamp: bound by a clamp to [-1, 1] in place of tanh.
    codes, ids: which of the two results to compute; the other is None.

    Returns codes [..., D] in z's dtype with values (level - L // 2) / (L // 2), and ids [...] in `ids_dtype` (int64,
    int32 or uint16): the mixed-radix number of the levels, first component fastest. A NaN gets level 0; an empty z
    gives empty results. The gradient with respect to z is that of the code before rounding.

    Raises TypeError or ValueError for a wrong dtype, shape or level, and when prod(levels) does not fit `ids_dtype`.
    Source: arXiv 2309.15505, section 3 and appendix A.
    """
    levels = _check_quantize(z, levels, codes, ids, ids_dtype)
    out_codes, out_ids = _quantize_op(z, levels, codes, ids, ids_dtype, symmetric, clamp)
    return out_codes if codes else None, out_ids if ids else None


def fsq_quantize_ref(
    z: torch.Tensor,
    levels: Sequence[int],
    *,
    symmetric: bool = False,
    clamp: bool = False,
    codes: bool = True,
    ids: bool = True,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The specification of `fsq_quantize` in plain PyTorch, without a gradient."""
    levels = _check_quantize(z, levels, codes, ids, ids_dtype)
    # [..., D], 0 .. L - 1
    level = _level(z.float(), levels, Form(symmetric, clamp))
    level = torch.where(z.isnan(), torch.zeros_like(level), level)
    out_codes = _code(level, levels, symmetric).to(z.dtype) if codes else None
    out_ids = None
    if ids:
        out_ids = sum(level[..., d].to(torch.int64) * basis for d, basis in enumerate(_basis(levels))).to(ids_dtype)
    return out_codes, out_ids


def fsq_dequantize(
    ids: torch.Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The codes that `fsq_quantize` gave along with `ids`.

    ids: [...] int64, int32 or uint16, each from 0 to prod(levels) - 1. On the CPU an id outside raises ValueError;
        elsewhere it is looked for under FLEXKERNELS_CHECK=1 alone (that waits for the device) and otherwise gives some
        code.
    levels, symmetric: as for `fsq_quantize`. dtype: float32, bfloat16 or float16.

    Returns codes [..., D]; empty ids give empty codes. Raises TypeError or ValueError for a wrong dtype or level.
    """
    levels = _check_dequantize(ids, levels, dtype)
    return _dequantize_op(ids, levels, dtype, symmetric)


def fsq_dequantize_ref(
    ids: torch.Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The specification of `fsq_dequantize` in plain PyTorch."""
    levels = _check_dequantize(ids, levels, dtype)
    ids = ids.to(torch.int64)
    digits = [ids // basis % level for basis, level in zip(_basis(levels), levels, strict=True)]
    return _code(torch.stack(digits, -1).float(), levels, symmetric).to(dtype)


def _row(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """[D] float32 on the device of `like`; by fills, since a copy from the host cannot enter a CUDA graph."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=like.device) for value in values])


def _bound_terms(levels: tuple[int, ...], like: torch.Tensor, form: Form = PAPER):
    """half, offset, shift [D] float32 of bound(z) = squash(z + shift) * half - offset."""
    half = (_row(levels, like) - 1) * (1 + 1e-3) / 2
    offset = _row([0.5 * (level % 2 == 0) for level in levels], like)
    return half, offset, offset / half if form.clamp else torch.atanh(offset / half)


def _level(z: torch.Tensor, levels: tuple[int, ...], form: Form) -> torch.Tensor:
    """float32 z [..., D] -> its levels, 0 .. L - 1, as float32."""
    if form.symmetric:
        return torch.floor((_row(levels, z) - 1) * (_squash(z, form) + 1) / 2 + 0.5)
    return torch.round(_bound(z, levels, form)) + _row([level // 2 for level in levels], z)


def _bound(z: torch.Tensor, levels: tuple[int, ...], form: Form = PAPER) -> torch.Tensor:
    half, offset, shift = _bound_terms(levels, z, form)
    return _squash(z + shift, form) * half - offset


def _squash(z: torch.Tensor, form: Form) -> torch.Tensor:
    return z.clamp(-1, 1) if form.clamp else torch.tanh(z)


def _code(level: torch.Tensor, levels: tuple[int, ...], symmetric: bool) -> torch.Tensor:
    """The codes of float32 levels [..., D]."""
    if symmetric:
        return 2 / (_row(levels, level) - 1) * level - 1
    half_width = _row([level // 2 for level in levels], level)
    return (level - half_width) / half_width


def _basis(levels: Sequence[int]) -> list[int]:
    """1, L0, L0 * L1, ...: what one step of each component adds to an id."""
    return [math.prod(levels[:d]) for d in range(len(levels))]


# tables


@functools.lru_cache(maxsize=64)
def thresholds(levels: tuple[int, ...], device: torch.device, form: Form = PAPER) -> torch.Tensor:
    """float32 [D, max(levels) - 1]: row d holds the largest z of levels 0 .. L_d - 2, then +inf.

    Found by bisection over all float32 values against the formula as torch evaluates it on the CPU, so every backend
    gives the codes of that formula.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _bisect(levels, form).to(device)


@functools.lru_cache(maxsize=64)
def code_table(levels: tuple[int, ...], device: torch.device, symmetric: bool) -> torch.Tensor | None:
    """float32 [D, max(levels)], the code of each level; None where the kernels divide by L // 2 instead."""
    if not symmetric:
        return None
    with torch.inference_mode(False), torch.no_grad():
        level = torch.arange(max(levels), device="cpu").float().unsqueeze(1)
        return _code(level, levels, symmetric).t().contiguous().to(device)


def _bisect(levels: tuple[int, ...], form: Form) -> torch.Tensor:
    ends = _ordinal(torch.tensor([-math.inf, math.inf], device="cpu"))
    # [max(levels) - 1, D]
    steps = torch.arange(max(levels) - 1, device="cpu").unsqueeze(1).expand(-1, len(levels))
    low, high = torch.full_like(steps, int(ends[0])), torch.full_like(steps, int(ends[1]))
    # level(low) <= step < level(high) throughout; the distance of 2**32 halves each time
    for _ in range(32):
        middle = (low + high) // 2
        below = _level(_from_ordinal(middle), levels, form) <= steps
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    exists = steps < torch.tensor(levels, device="cpu") - 1
    return torch.where(exists, _from_ordinal(low), math.inf).t().contiguous()


def _ordinal(value: torch.Tensor) -> torch.Tensor:
    """int64 numbers in the order of the float32 values, neighbours one apart (NaN excluded)."""
    bits = value.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def _from_ordinal(ordinal: torch.Tensor) -> torch.Tensor:
    bits = torch.where(ordinal < 0, (-ordinal - 1) | -0x80000000, ordinal)
    return bits.to(torch.int32).view(torch.float32)


# validation


def _check_quantize(z, levels, codes, ids, ids_dtype) -> tuple[int, ...]:
    checks.tensor("z", z, checks.FLOATS)
    levels = _check_levels(levels)
    if z.dim() == 0 or z.shape[-1] != len(levels):
        checks.reject("z", f"have the shape [..., {len(levels)}], a component for each level", list(z.shape))
    if not (codes or ids):
        checks.reject("codes or ids", "be asked for", "neither")
    _check_ids_dtype(ids_dtype)
    if ids:
        _check_fits(levels, ids_dtype)
    return levels


def _check_dequantize(ids, levels, dtype) -> tuple[int, ...]:
    checks.tensor("ids", ids, IDS)
    levels = _check_levels(levels)
    if dtype not in checks.FLOATS:
        checks.reject("dtype", f"be {checks.one_of(checks.FLOATS)}", dtype, TypeError)
    _check_fits(levels, torch.int64)
    return levels


def _check_ids_dtype(ids_dtype):
    if ids_dtype not in IDS:
        checks.reject("ids_dtype", f"be {checks.one_of(IDS)}", ids_dtype, TypeError)


def _check_levels(levels) -> tuple[int, ...]:
    levels = checks.integers("levels", levels, 2, MAX_LEVEL)
    if len(levels) > MAX_DIMS:
        checks.reject("levels", f"have at most {MAX_DIMS} entries", len(levels))
    return levels


def _check_fits(levels: tuple[int, ...], dtype: torch.dtype):
    size, most = math.prod(levels), IDS[dtype]
    if size > most:
        checks.reject("levels", f"multiply to at most {most} for {checks.short(dtype)} ids", size)


# ops


def _quantize_impl(z, levels, codes, ids, ids_dtype, symmetric=False, clamp=False):
    out_codes, out_ids = _quantize_fake(z, levels, codes, ids, ids_dtype)
    if z.numel() == 0:
        return out_codes, out_ids
    dims, form = len(levels), Form(symmetric, clamp)
    legacy.launch(
        "fsq_quantize",
        z.contiguous().view(-1, dims),
        thresholds(tuple(levels), z.device, form),
        levels,
        out_codes.view(-1, dims) if codes else None,
        out_ids.view(-1) if ids else None,
        form,
    )
    return out_codes, out_ids


def _quantize_fake(z, levels, codes, ids, ids_dtype, symmetric=False, clamp=False):
    # a result that is not asked for is an empty tensor: an op cannot return None
    out_codes = z.new_empty(z.shape if codes else (0,))
    out_ids = z.new_empty(z.shape[:-1] if ids else (0,), dtype=ids_dtype)
    return out_codes, out_ids


def _quantize_setup(ctx, inputs, output):
    z, ctx.levels, ctx.codes, _, _, *form = inputs
    ctx.form = Form(*form)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z)


def _quantize_backward(ctx, grad_codes, _):
    if not ctx.codes:
        return (None,) * 7
    (z,) = ctx.saved_tensors
    grad, bounded = grad_codes.float(), z.float()
    if ctx.form.symmetric:
        steps = _row(ctx.levels, z) - 1
        grad = grad * (2 / steps) / 2 * steps
    else:
        half, _, shift = _bound_terms(ctx.levels, z, ctx.form)
        grad, bounded = grad / _row([level // 2 for level in ctx.levels], z) * half, bounded + shift
    grad = torch.where(bounded.abs() <= 1, grad, 0) if ctx.form.clamp else grad * (1 - torch.tanh(bounded).square())
    return grad.to(z.dtype), *(None,) * 6


def _dequantize_impl(ids, levels, dtype, symmetric=False):
    out = _dequantize_fake(ids, levels, dtype)
    if ids.numel() == 0:
        return out
    if checks.values_are_checked(ids):
        _check_range(ids, math.prod(levels))
    legacy.launch("fsq_dequantize", ids.contiguous().view(-1), levels, out.view(-1, len(levels)), symmetric)
    return out


def _dequantize_fake(ids, levels, dtype, symmetric=False):
    return ids.new_empty((*ids.shape, len(levels)), dtype=dtype)


def _check_range(ids: torch.Tensor, size: int):
    low, high = (int(end) for end in torch.aminmax(ids.long()))
    if low < 0 or high >= size:
        checks.reject("ids", f"lie between 0 and {size - 1}", f"{low} to {high}")


_quantize_op = legacy.define(
    "fsq_quantize",
    "(Tensor z, int[] levels, bool codes, bool ids, ScalarType ids_dtype, bool symmetric=False, bool clamp=False) "
    "-> (Tensor, Tensor)",
    _quantize_impl,
    _quantize_fake,
)
_dequantize_op = legacy.define(
    "fsq_dequantize",
    "(Tensor ids, int[] levels, ScalarType dtype, bool symmetric=False) -> Tensor",
    _dequantize_impl,
    _dequantize_fake,
)
legacy.define_autograd("fsq_quantize", _quantize_backward, _quantize_setup)


# backends: each fills codes [n, D] (or None) and ids [n] (or None) from z [n, D]


def fsq_quantize_reference(z, thresholds, levels, codes, ids, form):
    wanted = {"codes": codes is not None, "ids": ids is not None}
    dtype = torch.int64 if ids is None else ids.dtype
    out_codes, out_ids = fsq_quantize_ref(z, levels, **form._asdict(), **wanted, ids_dtype=dtype)
    if codes is not None:
        codes.copy_(out_codes)
    if ids is not None:
        ids.copy_(out_ids)


def fsq_quantize_native(z, thresholds, levels, codes, ids, form):
    table = code_table(tuple(levels), z.device, form.symmetric)
    torch.ops.flexkernels_native.fsq_quantize(z, thresholds, levels, codes, ids, table)


def fsq_quantize_triton(z, thresholds, levels, codes, ids, form):
    from .triton import fsq

    table = code_table(tuple(levels), z.device, form.symmetric)
    fsq.fsq_quantize_triton(z, thresholds, levels, codes, ids, table)


def fsq_dequantize_reference(ids, levels, codes, symmetric):
    codes.copy_(fsq_dequantize_ref(ids, levels, symmetric=symmetric, dtype=codes.dtype))


def fsq_dequantize_native(ids, levels, codes, symmetric):
    table = code_table(tuple(levels), ids.device, symmetric)
    torch.ops.flexkernels_native.fsq_dequantize(ids, levels, codes, table)


def fsq_dequantize_triton(ids, levels, codes, symmetric):
    from .triton import fsq

    fsq.fsq_dequantize_triton(ids, levels, codes, code_table(tuple(levels), ids.device, symmetric))


legacy.register("fsq_quantize", "reference", fsq_quantize_reference)
legacy.register("fsq_quantize", "cpu", fsq_quantize_native)
legacy.register("fsq_quantize", "triton", fsq_quantize_triton)
legacy.register("fsq_quantize", "cuda", fsq_quantize_native)
legacy.register("fsq_dequantize", "reference", fsq_dequantize_reference)
legacy.register("fsq_dequantize", "cpu", fsq_dequantize_native)
legacy.register("fsq_dequantize", "triton", fsq_dequantize_triton)
legacy.register("fsq_dequantize", "cuda", fsq_dequantize_native)

"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): `fsq_quantize`, `fsq_dequantize` and their references.

round(tanh(.)) never falls, so a level is the number of float32 thresholds below z. The kernels count thresholds, which
are found once per level set; they need no transcendental function and agree bit for bit with the float32 formula. The
same holds of the variants, which other thresholds and a table of codes serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch

from . import checks, fsq_math, library
from .fsq_math import IDS, MAX_DIMS, MAX_LEVEL, PAPER, Form
from .typed import as_typed


@overload
def fsq_quantize(
    z: torch.Tensor, levels: Sequence[int], *, symmetric: bool = ..., clamp: bool = ..., codes: Literal[True] = ...,
    ids: Literal[True] = ..., ids_dtype: torch.dtype = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def fsq_quantize(
    z: torch.Tensor, levels: Sequence[int], *, symmetric: bool = ..., clamp: bool = ..., codes: Literal[False],
    ids: Literal[True] = ..., ids_dtype: torch.dtype = ...,
) -> tuple[None, torch.Tensor]: ...  # fmt: skip
@overload
def fsq_quantize(
    z: torch.Tensor, levels: Sequence[int], *, symmetric: bool = ..., clamp: bool = ..., codes: Literal[True] = ...,
    ids: Literal[False], ids_dtype: torch.dtype = ...,
) -> tuple[torch.Tensor, None]: ...  # fmt: skip
@overload
def fsq_quantize(
    z: torch.Tensor, levels: Sequence[int], *, symmetric: bool = ..., clamp: bool = ..., codes: bool = ...,
    ids: bool = ..., ids_dtype: torch.dtype = ...,
) -> tuple[torch.Tensor | None, torch.Tensor | None]: ...  # fmt: skip
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
    out_codes, out_ids = _quantize_op(z, levels, codes, ids, ids_dtype, symmetric, clamp)
    return out_codes if codes else None, out_ids if ids else None


@as_typed(fsq_quantize)
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
    check_quantize(z, levels, codes, ids, ids_dtype)
    out_codes, out_ids = fsq_math.quantize(z, levels, ids_dtype, Form(symmetric, clamp), codes, ids)
    return out_codes if codes else None, out_ids if ids else None


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
    return _dequantize_op(ids, levels, dtype, symmetric)


def fsq_dequantize_ref(
    ids: torch.Tensor, levels: Sequence[int], *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The specification of `fsq_dequantize` in plain PyTorch."""
    _check_dequantize_arguments(ids, levels, dtype)
    return fsq_math.dequantize(ids, levels, dtype, symmetric)


# validation


def check_quantize(z, levels, codes=True, ids=True, ids_dtype=torch.int64, symmetric=False, clamp=False):
    checks.tensor("z", z, checks.FLOATS)
    levels = check_levels(levels)
    if z.dim() == 0 or z.shape[-1] != len(levels):
        checks.reject("z", f"have the shape [..., {len(levels)}], a component for each level", list(z.shape))
    if not (codes or ids):
        checks.reject("codes or ids", "be asked for", "neither")
    check_ids_dtype(ids_dtype)
    if ids:
        check_fits(levels, ids_dtype)


def check_levels(levels) -> tuple[int, ...]:
    levels = checks.integers("levels", levels, 2, MAX_LEVEL)
    if len(levels) > MAX_DIMS:
        checks.reject("levels", f"have at most {MAX_DIMS} entries", len(levels))
    return levels


def check_ids_dtype(ids_dtype):
    if ids_dtype not in IDS:
        checks.reject("ids_dtype", f"be {checks.one_of(IDS)}", ids_dtype, TypeError)


def check_fits(levels: tuple[int, ...], dtype: torch.dtype):
    size, most = math.prod(levels), IDS[dtype]
    if size > most:
        checks.reject("levels", f"multiply to at most {most} for {checks.short(dtype)} ids", size)


def check_range(ids: torch.Tensor, levels):
    """Every id lies in the codebook; looks at the values where that is done, never while tracing."""
    if torch.compiler.is_compiling() or not ids.numel() or not checks.values_are_checked(ids):
        return
    size = math.prod(levels)
    low, high = (int(end) for end in torch.aminmax(ids.long()))
    if low < 0 or high >= size:
        checks.reject("ids", f"lie between 0 and {size - 1}", f"{low} to {high}")


def _check_dequantize_arguments(ids, levels, dtype):
    checks.tensor("ids", ids, IDS)
    levels = check_levels(levels)
    if dtype not in checks.FLOATS:
        checks.reject("dtype", f"be {checks.one_of(checks.FLOATS)}", dtype, TypeError)
    check_fits(levels, torch.int64)


def _check_dequantize(ids, levels, dtype, symmetric):
    _check_dequantize_arguments(ids, levels, dtype)
    check_range(ids, levels)


# shapes and gradients


def _quantize_fake(z, levels, codes, ids, ids_dtype, symmetric, clamp):
    # a result that is not asked for is an empty tensor: an op cannot return None
    out_codes = z.new_empty(z.shape if codes else (0,))
    return out_codes, z.new_empty(z.shape[:-1] if ids else (0,), dtype=ids_dtype)


def _quantize_setup(ctx, inputs, output):
    z, ctx.levels, ctx.codes, _, _, *form = inputs
    ctx.form = Form(*form)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z)


def _quantize_backward(ctx, grad_codes, _):
    if not ctx.codes:
        return (None,) * 7
    (z,) = ctx.saved_tensors
    return straight_through(grad_codes, z, ctx.levels, ctx.form), *(None,) * 6


def straight_through(grad_codes, z, levels, form=PAPER) -> torch.Tensor:
    """The gradient of z through the codes before rounding, in z's dtype."""
    grad, bounded = grad_codes.float(), z.float()
    if form.symmetric:
        steps = fsq_math.row(levels, z) - 1
        grad = grad * (2 / steps) / 2 * steps
    else:
        half, _, shift = fsq_math.bound_terms(levels, z, form)
        grad, bounded = grad / fsq_math.half_width(levels, z) * half, bounded + shift
    grad = torch.where(bounded.abs() <= 1, grad, 0) if form.clamp else grad * (1 - torch.tanh(bounded).square())
    return grad.to(z.dtype)


def _quantize_reference(z, levels, codes, ids, ids_dtype, symmetric, clamp):
    return fsq_math.quantize(z, levels, ids_dtype, Form(symmetric, clamp), codes, ids)


def quantize_jvp(z, levels, codes, ids, ids_dtype, symmetric, clamp):
    form = Form(symmetric, clamp)
    out_codes, out_ids = fsq_math.quantize(z, levels, ids_dtype, form, codes, ids)
    return with_slope(out_codes, z, levels, form) if codes else out_codes, out_ids


def with_slope(codes, z, levels, form=PAPER, where=True) -> torch.Tensor:
    """`codes` with the derivative of those before rounding, if only at the components `where`."""
    smooth = fsq_math.smooth(z.float(), levels, form)
    # zeros; a NaN's code is none
    slope = torch.where(smooth.isnan().logical_not() & where, smooth - smooth.detach(), 0)
    return (codes.float() + slope).to(z.dtype)


def _tables(levels, symmetric, clamp):
    """Thresholds, the codes of the levels (empty where they follow from a division), and what tanh adds to z."""
    device = torch.device("cpu")
    limits = fsq_math.thresholds(tuple(levels), device, Form(symmetric, clamp))
    table = fsq_math.code_table(tuple(levels), device, symmetric)
    _, _, shift = fsq_math.bound_terms(levels, limits)
    return limits, limits.new_empty(0) if table is None else table, shift


def _tables_fake(levels, symmetric, clamp):
    shape = len(levels), max(levels)
    return torch.empty(shape[0], shape[1] - 1), torch.empty(shape if symmetric else 0), torch.empty(shape[0])


# ops

_quantize_op = library.Op(
    "fsq_quantize",
    "(Tensor z, int[] levels, bool codes, bool ids, ScalarType ids_dtype, bool symmetric, bool clamp) "
    "-> (Tensor, Tensor)",
    check=check_quantize,
    reference=_quantize_reference,
    fake=_quantize_fake,
    triton="fsq",
    setup_context=_quantize_setup,
    backward=_quantize_backward,
    jvp=quantize_jvp,
)
_dequantize_op = library.Op(
    "fsq_dequantize",
    "(Tensor ids, int[] levels, ScalarType dtype, bool symmetric) -> Tensor",
    check=_check_dequantize,
    reference=fsq_math.dequantize,
    fake=lambda ids, levels, dtype, symmetric: ids.new_empty((*ids.shape, len(levels)), dtype=dtype),
    triton="fsq",
)
# C++ asks for them once for each level set, and keeps them
library.Op(
    "fsq_tables",
    "(int[] levels, bool symmetric, bool clamp) -> (Tensor, Tensor, Tensor)",
    check=lambda levels, symmetric, clamp: None,
    reference=_tables,
    fake=_tables_fake,
    plain=True,
)

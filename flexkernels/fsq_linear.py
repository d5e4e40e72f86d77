"""FSQ with the linear layer next to it: `fsq_project_quantize` (LN, linear, ids) and `fsq_embed` (ids, linear, tables).

z = weight (hidden - mean) / sqrt(var + eps) + bias is rounded as `fsq_quantize` does; the way back is
weight codes(id) + bias + positions[position_index], with whole rows replaced by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F

from . import checks, fsq_math, library, norm_math
from .fsq import check_fits, check_ids_dtype, check_levels, check_range, quantize_jvp, straight_through
from .fsq_math import IDS
from .typed import as_typed

REFERENCE_FLOATS = (*checks.FLOATS, torch.float64)


@overload
def fsq_project_quantize(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, levels: Sequence[int], *, eps: float = ...,
    return_codes: Literal[False] = ..., ids_dtype: torch.dtype = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def fsq_project_quantize(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, levels: Sequence[int], *, eps: float = ...,
    return_codes: Literal[True], ids_dtype: torch.dtype = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def fsq_project_quantize(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, levels: Sequence[int], *, eps: float = ...,
    return_codes: bool, ids_dtype: torch.dtype = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def fsq_project_quantize(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    levels: Sequence[int],
    *,
    eps: float = 1e-5,
    return_codes: bool = False,
    ids_dtype: torch.dtype = torch.int64,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The FSQ ids of linear(layer_norm(hidden)), LN without parameters, in one pass over hidden.

    hidden: [n, width] float32, bfloat16 or float16; the arithmetic is that of float32. weight: [D, width], bias: [D]
    or None, in one of those dtypes, with D = len(levels). levels, ids_dtype: as for `fsq_quantize`.

    Returns ids [n], with return_codes (ids, codes [n, D] in hidden's dtype). An empty hidden gives empty results. A
    component whose z lies within the rounding error of its float32 sums of a threshold may take either level; every
    other id is that of the float32 formula. Codes are differentiable with respect to hidden, weight and bias, by the
    gradient of bound(z) / (L // 2).
    Raises TypeError or ValueError for a wrong dtype, shape, device or level.
    """
    codes, ids = _project_op(hidden, weight, bias, levels, eps, return_codes, ids_dtype)
    return (ids, codes) if return_codes else ids


@as_typed(fsq_project_quantize)
def fsq_project_quantize_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    levels: Sequence[int],
    *,
    eps: float = 1e-5,
    return_codes: bool = False,
    ids_dtype: torch.dtype = torch.int64,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `fsq_project_quantize` in plain PyTorch, without a gradient."""
    _check_project(hidden, weight, bias, levels, eps, return_codes, ids_dtype)
    codes, ids = _project_reference(hidden, weight, bias, levels, eps, return_codes, ids_dtype)
    return (ids, codes) if return_codes else ids


def fsq_embed(
    ids: torch.Tensor,
    levels: Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    positions: torch.Tensor | None = None,
    position_index: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear(codes of ids) + positions[position_index], where token_index is not negative tokens[token_index] instead.

    ids: [n] int64, int32 or uint16, each from 0 to prod(levels) - 1. levels: as for `fsq_quantize`, D of them.
    weight: [width, D], bias: [width] or None, float32, bfloat16 or float16.
    positions: [P, width] like weight; position_index: int32 [n], from 0 to P - 1, or None where row i takes position i.
    tokens: [S, width] like weight, with token_index: int32 [n], below S.

    Returns [n, width] in weight's dtype, summed in float32; empty ids give an empty result. Differentiable in weight,
    bias, positions and tokens, by sums in a fixed order. Raises TypeError or ValueError for a wrong dtype, shape,
    device or level. Ids and indices out of range raise ValueError on the CPU; elsewhere they are looked at under
    FLEXKERNELS_CHECK=1 alone, and give undefined results.
    """
    return _embed_op(ids, levels, weight, bias, positions, position_index, tokens, token_index)


def fsq_embed_ref(
    ids: torch.Tensor,
    levels: Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    positions: torch.Tensor | None = None,
    position_index: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `fsq_embed` in plain, differentiable PyTorch; it takes float64 too and then computes so."""
    _check_embed_arguments(ids, levels, weight, bias, positions, position_index, tokens, token_index, REFERENCE_FLOATS)
    return _embed_reference(ids, levels, weight, bias, positions, position_index, tokens, token_index)


# validation


def _check_project(hidden, weight, bias, levels, eps, codes, ids_dtype):
    checks.tensor("hidden", hidden, checks.FLOATS, 2)
    levels = check_levels(levels)
    checks.at_least("eps", eps, 0)
    _check_linear(weight, (len(levels), hidden.shape[1]), bias, hidden, "hidden", checks.FLOATS)
    if hidden.shape[1] == 0:
        checks.reject("hidden", "have a width of at least 1", list(hidden.shape))
    check_ids_dtype(ids_dtype)
    check_fits(levels, ids_dtype)


def _check_linear(weight, shape, bias, like, like_name, floats):
    checks.tensor("weight", weight, floats, 2)
    checks.shape("weight", weight, shape)
    checks.same_device("weight", weight, like_name, like)
    if bias is not None:
        checks.tensor("bias", bias, (weight.dtype,))
        checks.shape("bias", bias, shape[:1])
        checks.same_device("bias", bias, like_name, like)


def _check_embed_arguments(
    ids, levels, weight, bias, positions, position_index, tokens, token_index, floats=checks.FLOATS
):
    checks.tensor("ids", ids, IDS, 1)
    levels = check_levels(levels)
    check_fits(levels, torch.int64)
    checks.tensor("weight", weight, floats, 2)
    width = weight.shape[0]
    _check_linear(weight, (width, len(levels)), bias, ids, "ids", floats)
    tables = (
        ("positions", positions, "position_index", position_index),
        ("tokens", tokens, "token_index", token_index),
    )
    for name, table, index_name, index in tables:
        if table is None:
            if index is not None:
                checks.reject(name, f"be given along with {index_name}", "None")
            continue
        checks.tensor(name, table, (weight.dtype,), 2)
        checks.shape(name, table, (table.shape[0], width))
        checks.same_device(name, table, "ids", ids)
        if index is None:
            continue
        checks.tensor(index_name, index, (torch.int32,))
        checks.shape(index_name, index, ids.shape, " of ids")
        checks.same_device(index_name, index, "ids", ids)
    if tokens is not None and token_index is None:
        checks.reject("token_index", "be given along with tokens", "None")
    if positions is not None and position_index is None and positions.shape[0] < ids.shape[0]:
        checks.reject("positions", "have a row for each id without position_index", list(positions.shape))


def _check_embed(ids, levels, weight, bias, positions, position_index, tokens, token_index):
    _check_embed_arguments(ids, levels, weight, bias, positions, position_index, tokens, token_index)
    check_range(ids, levels)
    _check_index("position_index", position_index, positions, 0)
    _check_index("token_index", token_index, tokens, -math.inf)


def _check_index(name, index, table, low):
    """The rows of the table that are taken exist; looks at the values where that is done, never while tracing."""
    if torch.compiler.is_compiling() or index is None or not index.numel() or not checks.values_are_checked(index):
        return
    lowest, highest = (int(end) for end in torch.aminmax(index))
    if lowest < low or highest >= table.shape[0]:
        checks.reject(name, f"lie below {table.shape[0]}", f"{lowest} to {highest}")


# fsq_project_quantize


def _project(hidden, weight, bias, eps) -> torch.Tensor:
    """z [n, D] float32."""
    normed = F.layer_norm(hidden.float(), hidden.shape[1:], eps=eps)
    return F.linear(normed, weight.float(), None if bias is None else bias.float())


def _project_reference(hidden, weight, bias, levels, eps, codes, ids_dtype):
    z = _project(hidden, weight, bias, eps)
    out_codes, ids = fsq_math.quantize(z, levels, ids_dtype, codes=codes)
    return out_codes.to(hidden.dtype), ids


def _project_jvp(hidden, weight, bias, levels, eps, codes, ids_dtype):
    # torch's own layer norm has wrong derivatives of its forward-mode derivative
    normed = norm_math.layer_norm(hidden.float(), None, None, None, eps)
    z = F.linear(normed, weight.float(), None if bias is None else bias.float())
    out_codes, ids = quantize_jvp(z, levels, codes, True, ids_dtype, False, False)
    return out_codes.to(hidden.dtype), ids


def _project_fake(hidden, weight, bias, levels, eps, codes, ids_dtype):
    n = hidden.shape[0]
    # a result that is not asked for is an empty tensor: an op cannot return None
    return hidden.new_empty((n, len(levels)) if codes else (0,)), hidden.new_empty(n, dtype=ids_dtype)


def _project_setup(ctx, inputs, output):
    hidden, weight, bias, ctx.levels, ctx.eps, ctx.codes, _ = inputs
    ctx.mark_non_differentiable(*output[ctx.codes :])
    ctx.save_for_backward(hidden, weight, bias)


def _project_backward(ctx, grad_codes, _):
    """grad_z = grad * bound'(z) / (L // 2), through the linear layer and LN: with y = (x - mean) / std,
    grad_x = (grad_y - mean(grad_y) - y * mean(grad_y * y)) / std.
    """
    if not ctx.codes:
        return (None,) * 7
    hidden, weight, bias = ctx.saved_tensors
    x = hidden.float()
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    inverse = (variance + ctx.eps).rsqrt()
    y = (x - mean) * inverse
    z = F.linear(y, weight.float(), None if bias is None else bias.float())
    grad_z = straight_through(grad_codes, z, ctx.levels)
    grad_y = grad_z @ weight.float()
    grad_x = (grad_y - grad_y.mean(1, keepdim=True) - y * (grad_y * y).mean(1, keepdim=True)) * inverse
    grad_bias = None if bias is None else grad_z.sum(0).to(bias.dtype)
    return grad_x.to(hidden.dtype), (grad_z.t() @ y).to(weight.dtype), grad_bias, None, None, None, None


_project_op = library.Op(
    "fsq_project_quantize",
    "(Tensor hidden, Tensor weight, Tensor? bias, int[] levels, float eps, bool codes, ScalarType ids_dtype) "
    "-> (Tensor, Tensor)",
    check=_check_project,
    reference=_project_reference,
    fake=_project_fake,
    triton="fsq_linear",
    setup_context=_project_setup,
    backward=_project_backward,
    jvp=_project_jvp,
)


# fsq_embed


def _embed_reference(ids, levels, weight, bias, positions, position_index, tokens, token_index):
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    codes = fsq_math.dequantize(ids, levels).to(wide)
    out = F.linear(codes, weight.to(wide), None if bias is None else bias.to(wide))
    if positions is not None:
        out = out + (positions[: len(ids)] if position_index is None else positions[position_index.long()]).to(wide)
    if tokens is not None and len(tokens):
        replaced = token_index >= 0
        out = torch.where(replaced.unsqueeze(1), tokens[token_index.clamp(min=0).long()].to(wide), out)
    return out.to(weight.dtype)


def _embed_fake(ids, levels, weight, bias, positions, position_index, tokens, token_index):
    return weight.new_empty(ids.shape[0], weight.shape[0])


def _embed_setup(ctx, inputs, output):
    ids, ctx.levels, _, bias, positions, position_index, tokens, token_index = inputs
    ctx.rows = [None if table is None else table.shape[0] for table in (positions, tokens)]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(ids, position_index, token_index)


def _embed_backward(ctx, grad):
    ids, position_index, token_index = ctx.saved_tensors
    positions, tokens = ctx.rows
    results = _embed_backward_op(grad, ids, ctx.levels, position_index, token_index, positions or 0, tokens or 0)
    grad_weight, grad_bias, grad_positions, grad_tokens = results
    return (
        None,
        None,
        grad_weight,
        grad_bias if ctx.has_bias else None,
        None if positions is None else grad_positions,
        None,
        None if tokens is None else grad_tokens,
        None,
    )


def _embed_gradients(grad, ids, levels, position_index, token_index, positions, tokens):
    wide = norm_math.wide(grad)
    kept = wide if token_index is None else wide.masked_fill((token_index >= 0).unsqueeze(1), 0)
    grad_weight = kept.t() @ fsq_math.dequantize(ids, levels).to(kept.dtype)
    grad_positions = wide.new_zeros(positions, wide.shape[1])
    if positions and position_index is None:
        grad_positions[: len(ids)] = kept
    elif positions:
        grad_positions = _sum_rows(kept, position_index, positions)
    grad_tokens = wide.new_zeros(tokens, wide.shape[1])
    if tokens:
        # rows that no token replaced go to one row more, which is cut off
        index = torch.where(token_index < 0, tokens, token_index)
        grad_tokens = _sum_rows(wide, index, tokens + 1)[:tokens]
    results = grad_weight, kept.sum(0), grad_positions, grad_tokens
    return tuple(result.to(grad.dtype) for result in results)


def _sum_rows(values, index, rows) -> torch.Tensor:
    """[rows, width], sums of the values [n, width] of each index, in a fixed order on every device."""
    sums = values.new_zeros(rows, values.shape[1])
    if values.device.type == "cpu":
        return sums.index_add_(0, index, values)
    # on CUDA index_add_ adds in any order, an accumulating index_put_ sorts before it adds
    return sums.index_put_((index.long(),), values, accumulate=True)


def _check_gradients(grad, ids, levels, position_index, token_index, positions, tokens):
    """Of tensors that autograd hands on."""


def _embed_gradients_fake(grad, ids, levels, position_index, token_index, positions, tokens):
    width = grad.shape[1]
    shapes = (width, len(levels)), (width,), (positions, width), (tokens, width)
    return tuple(grad.new_empty(shape) for shape in shapes)


_embed_op = library.Op(
    "fsq_embed",
    "(Tensor ids, int[] levels, Tensor weight, Tensor? bias, Tensor? positions, Tensor? position_index, "
    "Tensor? tokens, Tensor? token_index) -> Tensor",
    check=_check_embed,
    reference=_embed_reference,
    fake=_embed_fake,
    triton="fsq_linear",
    setup_context=_embed_setup,
    backward=_embed_backward,
)
# an op of its own, since a compiler would turn its sums into atomic additions in any order
_embed_backward_op = library.Op(
    "fsq_embed_backward",
    "(Tensor grad, Tensor ids, int[] levels, Tensor? position_index, Tensor? token_index, SymInt positions, "
    "SymInt tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_gradients,
    reference=_embed_gradients,
    fake=_embed_gradients_fake,
    plain=True,
)

"""FSQ with the linear layer next to it: `fsq_project_quantize` (LN, linear, ids) and `fsq_embed` (ids, linear, tables).

z = weight (hidden - mean) / sqrt(var + eps) + bias is rounded as `fsq_quantize` does; the way back is
weight codes(id) + bias + positions[position_index], with whole rows replaced by tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import checks, legacy
from .fsq import (
    IDS,
    _basis,
    _bound_terms,
    _check_fits,
    _check_ids_dtype,
    _check_levels,
    _check_range,
    _row,
    fsq_dequantize_ref,
    fsq_quantize_ref,
    thresholds,
)


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
    levels = _check_project(hidden, weight, bias, levels, eps, ids_dtype)
    codes, ids = _project_op(hidden, weight, bias, levels, float(eps), return_codes, ids_dtype)
    return (ids, codes) if return_codes else ids


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
    levels = _check_project(hidden, weight, bias, levels, eps, ids_dtype)
    z = _project(hidden, weight, bias, eps)
    codes, ids = fsq_quantize_ref(z, levels, ids_dtype=ids_dtype)
    return (ids, codes.to(hidden.dtype)) if return_codes else ids


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
    levels = _check_embed(ids, levels, weight, bias, positions, position_index, tokens, token_index)
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
    floats = (*checks.FLOATS, torch.float64)
    levels = _check_embed(ids, levels, weight, bias, positions, position_index, tokens, token_index, floats)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    codes = fsq_dequantize_ref(ids, levels).to(wide)
    out = F.linear(codes, weight.to(wide), None if bias is None else bias.to(wide))
    if positions is not None:
        out = out + (positions[: len(ids)] if position_index is None else positions[position_index.long()]).to(wide)
    if tokens is not None and len(tokens):
        replaced = token_index >= 0
        out = torch.where(replaced.unsqueeze(1), tokens[token_index.clamp(min=0).long()].to(wide), out)
    return out.to(weight.dtype)


# validation


def _check_project(hidden, weight, bias, levels, eps, ids_dtype) -> tuple[int, ...]:
    checks.tensor("hidden", hidden, checks.FLOATS, 2)
    levels = _check_levels(levels)
    checks.at_least("eps", eps, 0)
    _check_linear(weight, (len(levels), hidden.shape[1]), bias, hidden, "hidden", checks.FLOATS)
    if hidden.shape[1] == 0:
        checks.reject("hidden", "have a width of at least 1", list(hidden.shape))
    _check_ids_dtype(ids_dtype)
    _check_fits(levels, ids_dtype)
    return levels


def _check_linear(weight, shape, bias, like, like_name, floats):
    checks.tensor("weight", weight, floats, 2)
    checks.shape("weight", weight, shape)
    checks.same_device("weight", weight, like_name, like)
    if bias is not None:
        checks.tensor("bias", bias, (weight.dtype,))
        checks.shape("bias", bias, shape[:1])
        checks.same_device("bias", bias, like_name, like)


def _check_embed(
    ids, levels, weight, bias, positions, position_index, tokens, token_index, floats=checks.FLOATS
) -> tuple[int, ...]:
    checks.tensor("ids", ids, IDS, 1)
    levels = _check_levels(levels)
    _check_fits(levels, torch.int64)
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
    return levels


def _check_indices(ids, levels, positions, position_index, tokens, token_index):
    if not checks.values_are_checked(ids):
        return
    _check_range(ids, math.prod(levels))
    for name, index, table, low in (
        ("position_index", position_index, positions, 0),
        ("token_index", token_index, tokens, -math.inf),
    ):
        if index is None:
            continue
        lowest, highest = (int(end) for end in torch.aminmax(index))
        if lowest < low or highest >= table.shape[0]:
            checks.reject(name, f"lie below {table.shape[0]}", f"{lowest} to {highest}")


# fsq_project_quantize


def _project(hidden, weight, bias, eps) -> torch.Tensor:
    """z [n, D] float32."""
    normed = F.layer_norm(hidden.float(), hidden.shape[1:], eps=eps)
    return F.linear(normed, weight.float(), None if bias is None else bias.float())


def _project_impl(hidden, weight, bias, levels, eps, codes, ids_dtype):
    out_codes, ids = _project_fake(hidden, weight, bias, levels, eps, codes, ids_dtype)
    if ids.numel():
        legacy.launch(
            "fsq_project_quantize",
            hidden.contiguous(),
            weight.float().contiguous(),
            None if bias is None else bias.float().contiguous(),
            thresholds(tuple(levels), hidden.device),
            levels,
            eps,
            out_codes if codes else None,
            ids,
        )
    return out_codes, ids


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
    half, _, shift = _bound_terms(tuple(ctx.levels), z)
    slope = (1 - torch.tanh(z + shift).square()) * half / _row([level // 2 for level in ctx.levels], z)
    grad_z = grad_codes.float() * slope
    grad_y = grad_z @ weight.float()
    grad_x = (grad_y - grad_y.mean(1, keepdim=True) - y * (grad_y * y).mean(1, keepdim=True)) * inverse
    grad_bias = None if bias is None else grad_z.sum(0).to(bias.dtype)
    return grad_x.to(hidden.dtype), (grad_z.t() @ y).to(weight.dtype), grad_bias, None, None, None, None


_project_op = legacy.define(
    "fsq_project_quantize",
    "(Tensor hidden, Tensor weight, Tensor? bias, int[] levels, float eps, bool codes, ScalarType ids_dtype) "
    "-> (Tensor, Tensor)",
    _project_impl,
    _project_fake,
)
legacy.define_autograd("fsq_project_quantize", _project_backward, _project_setup)


# fsq_embed


def _embed_impl(ids, levels, weight, bias, positions, position_index, tokens, token_index):
    out = _embed_fake(ids, levels, weight, bias, positions, position_index, tokens, token_index)
    if ids.numel():
        _check_indices(ids, levels, positions, position_index, tokens, token_index)
    if out.numel():
        legacy.launch(
            "fsq_embed",
            ids.contiguous(),
            levels,
            # [D, width]: vectors run along the width
            weight.float().t().contiguous(),
            None if bias is None else bias.float().contiguous(),
            *(None if each is None else each.contiguous() for each in (positions, position_index, tokens, token_index)),
            out,
        )
    return out


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


def _embed_backward_impl(grad, ids, levels, position_index, token_index, positions, tokens):
    wide = grad.float()
    kept = wide if token_index is None else wide.masked_fill((token_index >= 0).unsqueeze(1), 0)
    grad_weight = kept.t() @ fsq_dequantize_ref(ids, levels)
    grad_positions = wide.new_zeros(positions, wide.shape[1])
    if positions and position_index is None:
        grad_positions[: len(ids)] = kept
    elif positions:
        grad_positions = _sum_rows(kept, position_index, positions)
    grad_tokens = wide.new_zeros(tokens, wide.shape[1])
    if tokens:
        # rows that no token replaced go to one row more, which is cut off
        index = torch.where(token_index < 0, tokens, token_index)
        grad_tokens = _sum_rows(wide, index, tokens + 1)[:tokens].contiguous()
    results = grad_weight, kept.sum(0), grad_positions, grad_tokens
    return tuple(result.to(grad.dtype) for result in results)


def _sum_rows(values, index, rows) -> torch.Tensor:
    """[rows, width], sums of the values [n, width] of each index, in a fixed order on every device."""
    sums = values.new_zeros(rows, values.shape[1])
    if values.device.type == "cpu":
        return sums.index_add_(0, index, values)
    # on CUDA index_add_ adds in any order, an accumulating index_put_ sorts before it adds
    return sums.index_put_((index.long(),), values, accumulate=True)


def _embed_backward_fake(grad, ids, levels, position_index, token_index, positions, tokens):
    width = grad.shape[1]
    shapes = (width, len(levels)), (width,), (positions, width), (tokens, width)
    return tuple(grad.new_empty(shape) for shape in shapes)


_embed_op = legacy.define(
    "fsq_embed",
    "(Tensor ids, int[] levels, Tensor weight, Tensor? bias, Tensor? positions, Tensor? position_index, "
    "Tensor? tokens, Tensor? token_index) -> Tensor",
    _embed_impl,
    _embed_fake,
)
# an op of its own, since a compiler would turn its sums into atomic additions in any order
_embed_backward_op = legacy.define(
    "fsq_embed_backward",
    "(Tensor grad, Tensor ids, int[] levels, Tensor? position_index, Tensor? token_index, SymInt positions, "
    "SymInt tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    _embed_backward_impl,
    _embed_backward_fake,
)
legacy.define_autograd("fsq_embed", _embed_backward, _embed_setup)


# backends: each fills codes [n, D] (or None) and ids [n], or out [n, width]; weights and biases are float32


def fsq_project_quantize_reference(hidden, weight, bias, thresholds, levels, eps, codes, ids):
    out_codes, out_ids = fsq_quantize_ref(_project(hidden, weight, bias, eps), levels, ids_dtype=ids.dtype)
    ids.copy_(out_ids)
    if codes is not None:
        codes.copy_(out_codes)


def fsq_project_quantize_native(*args):
    torch.ops.flexkernels_native.fsq_project_quantize(*args)


def fsq_project_quantize_triton(hidden, weight, bias, thresholds, levels, eps, codes, ids):
    from .triton import fsq_linear

    table = id_table(tuple(levels), hidden.device)
    fsq_linear.fsq_project_quantize_triton(hidden, weight, bias, thresholds, table, eps, codes, ids)


@functools.lru_cache(maxsize=64)
def id_table(levels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [2, D]: L // 2 and what one step of each component adds to an id."""
    with torch.inference_mode(False):
        return torch.tensor([[level // 2 for level in levels], _basis(levels)], device="cpu").to(device)


def fsq_embed_reference(ids, levels, weight, bias, positions, position_index, tokens, token_index, out):
    settings = {"position_index": position_index, "token_index": token_index}
    tables = {name: None if t is None else t.float() for name, t in (("positions", positions), ("tokens", tokens))}
    out.copy_(fsq_embed_ref(ids, levels, weight.t(), bias, **tables, **settings))


def fsq_embed_native(*args):
    torch.ops.flexkernels_native.fsq_embed(*args)


def fsq_embed_triton(*args):
    from .triton import fsq_linear

    fsq_linear.fsq_embed_triton(*args)


legacy.register("fsq_project_quantize", "reference", fsq_project_quantize_reference)
legacy.register("fsq_project_quantize", "cpu", fsq_project_quantize_native)
legacy.register("fsq_project_quantize", "triton", fsq_project_quantize_triton)
legacy.register("fsq_project_quantize", "cuda", fsq_project_quantize_native)
legacy.register("fsq_embed", "reference", fsq_embed_reference)
legacy.register("fsq_embed", "cpu", fsq_embed_native)
legacy.register("fsq_embed", "triton", fsq_embed_triton)
legacy.register("fsq_embed", "cuda", fsq_embed_native)

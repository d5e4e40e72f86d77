"""FSQ with the linear layer next to it, float32 inside whatever comes in.

project:  z = weight (hidden - mean) / sqrt(var + eps) + bias,  level_d = count(thresholds[d] < z_d),
          code_d = (level_d - L_d // 2) / (L_d // 2),  id = sum level_d * basis_d
embed:    out = sum_d code_d(id) * weight_d + bias + positions[position_index], or tokens[token_index]
"""

import torch
import triton
import triton.language as tl

from ..fsq_math import id_table, thresholds

ROWS = 16
BLOCK_PROJECT = 32
BLOCK_EMBED = 128
NUM_WARPS = 4
# what tl.dot needs at least, and the most dimensions there are
DIMS_PADDED = 16


@triton.jit
def fsq_project_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_thresholds,
    p_table,
    p_codes,
    p_ids,
    n,
    width,
    steps,
    dims,
    eps,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # hidden [n, width], weight [dims, width], thresholds [dims, steps], table [2, dims]: half widths, basis
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < n
    o_d = tl.arange(0, DIMS)
    m_d = o_d < dims
    b_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        o_j = begin + tl.arange(0, BLOCK)
        m_x = m_n[:, None] & (o_j < width)[None, :]
        b_sum += tl.load(p_hidden + o_n[:, None] * width + o_j[None, :], mask=m_x, other=0.0).to(tl.float32)
    # a width of 1 is a constant, which has no .to
    count = tl.cast(width, tl.float32)
    b_mean = tl.div_rn(tl.sum(b_sum, 1), count)
    b_square = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    b_dot = tl.zeros([ROWS, DIMS], dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        o_j = begin + tl.arange(0, BLOCK)
        m_j = o_j < width
        m_x = m_n[:, None] & m_j[None, :]
        b_x = tl.load(p_hidden + o_n[:, None] * width + o_j[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
        b_square += b_x * b_x
        m_w = m_j[:, None] & m_d[None, :]
        b_w = tl.load(p_weight + o_d[None, :] * width + o_j[:, None], mask=m_w, other=0.0)
        b_dot = tl.dot(b_x, b_w, b_dot, input_precision="ieee")
    b_variance = tl.div_rn(tl.sum(b_square, 1), count)
    b_z = b_dot * tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))[:, None]
    if p_bias is not None:
        b_z += tl.load(p_bias + o_d, mask=m_d, other=0.0)[None, :]
    b_level = tl.zeros([ROWS, DIMS], dtype=tl.int32)
    for step in range(0, steps):
        b_t = tl.load(p_thresholds + o_d * steps + step, mask=m_d, other=float("inf"))
        b_level += (b_z > b_t[None, :]).to(tl.int32)
    b_half = tl.load(p_table + o_d, mask=m_d, other=1)
    if p_codes is not None:
        b_code = tl.div_rn((b_level - b_half[None, :]).to(tl.float32), b_half.to(tl.float32)[None, :])
        m_code = m_n[:, None] & m_d[None, :]
        tl.store(p_codes + o_n[:, None] * dims + o_d[None, :], b_code.to(p_codes.dtype.element_ty), mask=m_code)
    b_basis = tl.load(p_table + dims + o_d, mask=m_d, other=0)
    b_id = tl.sum(b_level.to(tl.int64) * b_basis[None, :], 1)
    tl.store(p_ids + o_n, b_id.to(p_ids.dtype.element_ty), mask=m_n)


@triton.jit
def fsq_embed_kernel(
    p_ids,
    p_weight,
    p_bias,
    p_positions,
    p_position_index,
    p_tokens,
    p_token_index,
    p_out,
    n,
    width,
    LEVELS: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # ids [n], weight [DIMS, width], positions and tokens [.., width], out [n, width]
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    m_j = o_j < width
    m_out = m_n[:, None] & m_j[None, :]
    b_rest = tl.load(p_ids + o_n, mask=m_n, other=0)
    if p_ids.dtype.element_ty == tl.uint16:
        # levels less their half are signed
        b_rest = b_rest.to(tl.int32)
    b_out = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_j, mask=m_j, other=0.0)[None, :]
    for d in tl.static_range(DIMS):
        b_level = b_rest % LEVELS[d]
        b_rest = b_rest // LEVELS[d]
        b_code = tl.div_rn((b_level - LEVELS[d] // 2).to(tl.float32), (LEVELS[d] // 2) * 1.0)
        b_out += b_code[:, None] * tl.load(p_weight + d * width + o_j, mask=m_j, other=0.0)[None, :]
    if p_positions is not None:
        o_position = o_n
        if p_position_index is not None:
            o_position = tl.load(p_position_index + o_n, mask=m_n, other=0).to(tl.int64)
        b_out += tl.load(p_positions + o_position[:, None] * width + o_j[None, :], mask=m_out, other=0.0).to(tl.float32)
    if p_tokens is not None:
        o_token = tl.load(p_token_index + o_n, mask=m_n, other=-1).to(tl.int64)
        m_token = m_out & (o_token >= 0)[:, None]
        b_token = tl.load(p_tokens + o_token[:, None] * width + o_j[None, :], mask=m_token, other=0.0).to(tl.float32)
        b_out = tl.where(m_token, b_token, b_out)
    tl.store(p_out + o_n[:, None] * width + o_j[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)


def fsq_project_quantize_triton(hidden, weight, bias, levels, eps, codes, ids_dtype):
    n, width = hidden.shape
    out_codes = hidden.new_empty((n, len(levels)) if codes else (0,))
    ids = hidden.new_empty(n, dtype=ids_dtype)
    if n == 0:
        return out_codes, ids
    levels = tuple(levels)
    limits = thresholds(levels, hidden.device)
    with torch.cuda.device_of(hidden):
        fsq_project_kernel[(triton.cdiv(n, ROWS),)](
            hidden.contiguous(),
            weight.float().contiguous(),
            None if bias is None else bias.float().contiguous(),
            limits,
            id_table(levels, hidden.device),
            out_codes if codes else None,
            ids,
            n,
            width,
            limits.shape[1],
            len(levels),
            float(eps),
            ROWS=ROWS,
            DIMS=DIMS_PADDED,
            BLOCK=BLOCK_PROJECT,
            num_warps=NUM_WARPS,
        )
    return out_codes, ids


def fsq_embed_triton(ids, levels, weight, bias, positions, position_index, tokens, token_index):
    n, width = ids.shape[0], weight.shape[0]
    out = weight.new_empty(n, width)
    if out.numel() == 0:
        return out
    tables = (positions, position_index, tokens, token_index)
    with torch.cuda.device_of(ids):
        fsq_embed_kernel[(triton.cdiv(n, ROWS), triton.cdiv(width, BLOCK_EMBED))](
            ids.contiguous(),
            # [D, width]: a program's columns are neighbours
            weight.float().t().contiguous(),
            None if bias is None else bias.float().contiguous(),
            *(None if table is None else table.contiguous() for table in tables),
            out,
            n,
            width,
            LEVELS=tuple(levels),
            DIMS=len(levels),
            ROWS=ROWS,
            BLOCK=BLOCK_EMBED,
            num_warps=NUM_WARPS,
        )
    return out

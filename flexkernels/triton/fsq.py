"""FSQ in Triton, float32 inside whatever comes in.

quantize:   level_d = count(thresholds[d] < z_d),  code_d = (level_d - L_d // 2) / (L_d // 2),
            id = sum level_d * basis_d
dequantize: level_d = id // basis_d mod L_d,  code_d as above
With a table of codes [D, width + 1], code_d = table[d][level_d] instead.
"""

import torch
import triton
import triton.language as tl

from ..fsq_math import Form, basis, code_table, thresholds

BLOCK_QUANTIZE = 256
BLOCK_DEQUANTIZE = 512
NUM_WARPS = 4


@triton.jit
def fsq_quantize_kernel(
    p_z,
    p_thresholds,
    p_table,
    p_codes,
    p_ids,
    n,
    width,
    LEVELS: tl.constexpr,
    BASIS: tl.constexpr,
    DIMS: tl.constexpr,
    CODES: tl.constexpr,
    IDS: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # z [n, DIMS], thresholds [DIMS, width]
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_id = tl.zeros([BLOCK], dtype=tl.int64)
    for d in tl.static_range(DIMS):
        b_z = tl.load(p_z + o_n * DIMS + d, mask=m_n, other=0.0).to(tl.float32)
        b_level = count_below(b_z, p_thresholds + d * width, LEVELS[d] - 1)
        if CODES:
            b_code = code_of(b_level, p_table + d * (width + 1), LEVELS[d] // 2, TABLE)
            tl.store(p_codes + o_n * DIMS + d, b_code.to(p_codes.dtype.element_ty), mask=m_n)
        if IDS:
            b_id += b_level.to(tl.int64) * BASIS[d]
    if IDS:
        tl.store(p_ids + o_n, b_id.to(p_ids.dtype.element_ty), mask=m_n)


@triton.jit
def count_below(b_z, p_row, COUNT: tl.constexpr):
    """How many of the COUNT rising values at p_row are below b_z, by bisection; 0 for NaN."""
    b_level = tl.zeros_like(b_z).to(tl.int32)
    for bit in tl.static_range(8):
        if (128 >> bit) <= COUNT:
            o_t = b_level + ((128 >> bit) - 1)
            b_t = tl.load(p_row + o_t, mask=o_t < COUNT, other=float("inf"))
            b_level = tl.where(b_z > b_t, o_t + 1, b_level)
    return b_level


@triton.jit
def code_of(b_level, p_row, HALF: tl.constexpr, TABLE: tl.constexpr):
    """(level - HALF) / HALF, or the level's entry of a table row."""
    if TABLE:
        # an id outside the codebook may be negative
        return tl.load(p_row + tl.maximum(b_level, 0))
    return tl.div_rn((b_level - HALF).to(tl.float32), HALF * 1.0)


@triton.jit
def fsq_dequantize_kernel(
    p_ids,
    p_table,
    p_codes,
    n,
    width,
    LEVELS: tl.constexpr,
    DIMS: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # ids [n], codes [n, DIMS]
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_rest = tl.load(p_ids + o_n, mask=m_n, other=0)
    if p_ids.dtype.element_ty == tl.uint16:
        # levels less their half are signed
        b_rest = b_rest.to(tl.int32)
    for d in tl.static_range(DIMS):
        b_level = b_rest % LEVELS[d]
        b_rest = b_rest // LEVELS[d]
        b_code = code_of(b_level, p_table + d * (width + 1), LEVELS[d] // 2, TABLE)
        tl.store(p_codes + o_n * DIMS + d, b_code.to(p_codes.dtype.element_ty), mask=m_n)


def fsq_quantize_triton(z, levels, codes, ids, ids_dtype, symmetric, clamp):
    dims = len(levels)
    out_codes = z.new_empty(z.shape if codes else (0,))
    out_ids = z.new_empty(z.shape[:-1] if ids else (0,), dtype=ids_dtype)
    n = z.numel() // dims
    if n == 0:
        return out_codes, out_ids
    levels = tuple(levels)
    limits = thresholds(levels, z.device, Form(symmetric, clamp))
    table = code_table(levels, z.device, symmetric)
    z = z.contiguous()
    with torch.cuda.device_of(z):
        fsq_quantize_kernel[(triton.cdiv(n, BLOCK_QUANTIZE),)](
            z,
            limits,
            z if table is None else table,
            out_codes,
            out_ids,
            n,
            limits.shape[1],
            LEVELS=levels,
            # a codebook that no id is asked of may be too large for int64
            BASIS=tuple(basis(levels)) if ids else (0,) * dims,
            DIMS=dims,
            CODES=codes,
            IDS=ids,
            TABLE=table is not None,
            BLOCK=BLOCK_QUANTIZE,
            num_warps=NUM_WARPS,
        )
    return out_codes, out_ids


def fsq_dequantize_triton(ids, levels, dtype, symmetric):
    dims, n = len(levels), ids.numel()
    codes = ids.new_empty((*ids.shape, dims), dtype=dtype)
    if n == 0:
        return codes
    ids, table = ids.contiguous(), code_table(tuple(levels), ids.device, symmetric)
    with torch.cuda.device_of(ids):
        fsq_dequantize_kernel[(triton.cdiv(n, BLOCK_DEQUANTIZE),)](
            ids,
            codes if table is None else table,
            codes,
            n,
            max(levels) - 1,
            LEVELS=tuple(levels),
            DIMS=dims,
            TABLE=table is not None,
            BLOCK=BLOCK_DEQUANTIZE,
            num_warps=NUM_WARPS,
        )
    return codes

"""A linear layer for few rows in Triton: a program reads BLOCK_N rows of weight once against all rows of x.

y = (x @ weight.T) * scale + bias,   swiglu: y = silu(y1) * y3,   out = y + residual;   a norm of x is a kernel before
"""

import torch
import triton
import triton.language as tl

from .. import library
from .elementary import sigmoid
from .norm import rms_norm_triton

# the least that tl.dot takes
BLOCK_M = 16
BLOCK_N = 16
BLOCK_K = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
NUM_WARPS = 4


@triton.jit
def product(p_x, p_weight, o_n, m_n, m, k, x_stride, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [m, k] times the rows o_n of weight, [BLOCK_M, BLOCK_N] float32."""
    o_m, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    b_y = tl.zeros([BLOCK_M, o_n.shape[0]], dtype=tl.float32)
    b_lost = b_y
    for start in range(0, k, BLOCK_K):
        m_k = start + o_k < k
        # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
        p_b_x = p_x + o_m[:, None].to(tl.int64) * x_stride + (start + o_k)[None, :]
        p_b_w = p_weight + o_n[:, None] * k + (start + o_k)[None, :]
        b_x = tl.load(p_b_x, mask=(o_m < m)[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_b_w, mask=m_n[:, None] & m_k[None, :], other=0)
        if p_x.dtype.element_ty == tl.float32:
            # one chain of k sums would lose bits: each block's is added with what rounding took from the last one
            b_part = tl.dot(b_x, tl.trans(b_w.to(tl.float32)), input_precision="ieee") - b_lost
            b_sum = b_y + b_part
            b_lost = (b_sum - b_y) - b_part
            b_y = b_sum
        else:
            if WIDE:
                b_x = b_x.to(tl.float32)
            b_y = tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)), b_y, input_precision="ieee")
    return b_y


@triton.jit
def finish(b_y, p_scale, p_bias, o_n, m_n):
    if p_scale is not None:
        b_y *= tl.load(p_scale + o_n, mask=m_n, other=0.0)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return b_y


@triton.jit
def skinny_linear_kernel(
    p_x,
    p_weight,
    p_scale,
    p_bias,
    p_residual,
    p_out,
    m,
    k,
    outputs,
    x_stride,
    residual_stride,
    SWIGLU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    b_y = product(p_x, p_weight, o_n, m_n, m, k, x_stride, WIDE, BLOCK_M, BLOCK_K)
    b_y = finish(b_y, p_scale, p_bias, o_n, m_n)
    if SWIGLU:
        b_up = product(p_x, p_weight, o_n + outputs, m_n, m, k, x_stride, WIDE, BLOCK_M, BLOCK_K)
        b_up = finish(b_up, p_scale, p_bias, o_n + outputs, m_n)
        b_y = b_y * sigmoid(b_y, p_out.dtype.element_ty == tl.float32) * b_up
    m_out = (o_m < m)[:, None] & m_n[None, :]
    o_row = o_m[:, None].to(tl.int64)
    if p_residual is not None:
        b_y += tl.load(p_residual + o_row * residual_stride + o_n[None, :], mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out + o_row * outputs + o_n[None, :], b_y.to(p_out.dtype.element_ty), mask=m_out)


def skinny_linear_triton(x, weight, weight_scale, bias, residual, swiglu, norm_weight=None, norm_eps=1e-6):
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = x.new_empty((x.shape[0], outputs))
    if out.numel() == 0:
        return out
    if norm_weight is not None:
        x = rms_norm_triton(x, norm_weight, None, norm_eps)[1]
    x, residual = _dense(x), _dense(residual)
    weight, weight_scale, bias = (None if t is None else t.contiguous() for t in (weight, weight_scale, bias))
    with torch.cuda.device_of(x):
        skinny_linear_kernel[(triton.cdiv(outputs, BLOCK_N),)](
            x,
            weight,
            weight_scale,
            bias,
            residual,
            out,
            x.shape[0],
            x.shape[1],
            outputs,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            SWIGLU=swiglu,
            # the interpreter multiplies the bits of bfloat16
            WIDE=library.interpreting(),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K[x.dtype],
            num_warps=NUM_WARPS,
        )
    return out


def _dense(rows):
    """Rows contiguous, whatever lies between them."""
    return rows if rows is None or rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()

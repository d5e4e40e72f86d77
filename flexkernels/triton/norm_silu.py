"""silu((x - mean) * rstd * weight + bias) of rows in Triton: x is read once, float32 inside whatever comes in."""

import torch
import triton
import triton.language as tl

from .elementary import sigmoid

# elements a program has at most, of several rows where they are short
TILE = 2048


@triton.jit
def norm_silu_kernel(p_x, p_weight, p_bias, p_out, n, d, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < d
    # [ROWS, BLOCK]
    o_nd = o_n[:, None] * d + o_d[None, :]
    m_nd = (o_n < n)[:, None] & m_d[None, :]
    b_x = tl.load(p_x + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    b_c = tl.where(m_d[None, :], b_x - (tl.sum(b_x, 1) / d)[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_c * b_c, 1) / d + eps)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    b_y = b_c * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    b_out = b_y * sigmoid(b_y, p_out.dtype.element_ty == tl.float32)
    tl.store(p_out + o_nd, b_out.to(p_out.dtype.element_ty), mask=m_nd)


def norm_silu_triton(x, weight, bias, eps):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        launch(x.contiguous(), weight.contiguous(), bias.contiguous(), eps, out)
    return out


def launch(x, weight, bias, eps, out):
    """Fills out from x, both contiguous ``[..., d]``, neither empty."""
    d = x.shape[-1]
    n, block = x.numel() // d, triton.next_power_of_2(d)
    rows = max(1, TILE // block)
    with torch.cuda.device_of(x):
        norm_silu_kernel[(triton.cdiv(n, rows),)](
            x, weight, bias, out, n, d, eps, ROWS=rows, BLOCK=block,
            num_warps=4 if block <= TILE else 16,
        )  # fmt: skip

"""One guided flow step in Triton: a program per row, the row read twice by APG (sums, then the step), once otherwise.

With c = v_cond, d = c - v_uncond + momentum * buffer, and the row sums |d|, |c|, d.c:
    s = min(1, threshold / |d|),  p = s * d.c / max(|c|, 1e-12)^2,  v = c + (scale - 1) * (s * d - (1 - eta) * p * c)
    x_next = x + dt * v,  and the first elements of the row become clean * prefix + noisy * prefix_noise
"""

import torch
import triton
import triton.language as tl

from ..flow_math import GUIDANCE_APG, GUIDANCE_CFG

BLOCK = 1024
NUM_WARPS = 4
# blocks that one program of a step without row sums goes through
BLOCKS_EACH = 4


@triton.jit
def flow_step_kernel(
    p_x,
    p_cond,
    p_uncond,
    p_buffer,
    p_row_offsets,
    p_prefix,
    p_prefix_offsets,
    p_prefix_noise,
    p_x_next,
    p_momentum,
    total,
    length,
    dt,
    strength,
    threshold,
    shed,
    momentum,
    clean,
    noisy,
    CFG: tl.constexpr,
    APG: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # strength = scale - 1, shed = 1 - eta, clean = 1 - prefix_time, noisy = prefix_time
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    end = start + length
    if p_row_offsets is not None:
        # offsets out of range must not reach foreign memory
        start = tl.maximum(tl.load(p_row_offsets + row), 0)
        end = tl.minimum(tl.load(p_row_offsets + row + 1), total)
    prefix_start = row * 0
    prefix_length = row * 0
    if p_prefix is not None:
        prefix_start = tl.load(p_prefix_offsets + row)
        prefix_length = tl.load(p_prefix_offsets + row + 1) - prefix_start
    first = start + tl.program_id(1) * BLOCK
    stride = tl.num_programs(1) * BLOCK
    factor, parallel = 1.0, 0.0
    if APG:
        factor, parallel = row_factors(p_cond, p_uncond, p_buffer, start, end, threshold, momentum, THRESHOLD, BLOCK)
    for begin in range(first, end, stride):
        o_row = begin + tl.arange(0, BLOCK)
        m_row = o_row < end
        b_v = tl.load(p_cond + o_row, mask=m_row, other=0.0).to(tl.float32)
        if CFG:
            b_u = tl.load(p_uncond + o_row, mask=m_row, other=0.0).to(tl.float32)
            b_v = b_u + (strength + 1) * (b_v - b_u)
        if APG:
            b_d = load_direction(b_v, p_uncond, p_buffer, o_row, m_row, momentum)
            if p_momentum is not None:
                tl.store(p_momentum + o_row, b_d, mask=m_row)
            b_v = b_v + strength * (factor * b_d - shed * parallel * b_v)
        b_x = tl.load(p_x + o_row, mask=m_row, other=0.0).to(tl.float32) + dt * b_v
        if p_prefix is not None:
            o_prefix = prefix_start + o_row - start
            m_prefix = m_row & (o_row - start < prefix_length)
            b_prefix = clean * tl.load(p_prefix + o_prefix, mask=m_prefix, other=0.0)
            if p_prefix_noise is not None:
                b_prefix += noisy * tl.load(p_prefix_noise + o_prefix, mask=m_prefix, other=0.0)
            b_x = tl.where(m_prefix, b_prefix, b_x)
        tl.store(p_x_next + o_row, b_x.to(p_x_next.dtype.element_ty), mask=m_row)


@triton.jit
def load_direction(b_c, p_uncond, p_buffer, o_row, m_row, momentum):
    """d = c - v_uncond + momentum * buffer, 0 beyond the row where c is."""
    b_d = b_c - tl.load(p_uncond + o_row, mask=m_row, other=0.0).to(tl.float32)
    if p_buffer is not None:
        b_d += momentum * tl.load(p_buffer + o_row, mask=m_row, other=0.0)
    return b_d


@triton.jit
def row_factors(
    p_cond, p_uncond, p_buffer, start, end, threshold, momentum, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr
):
    """s = min(1, threshold / |d|) and p = s * d.c / max(|c|, 1e-12)^2 of one row."""
    b_dd = tl.zeros([BLOCK], dtype=tl.float32)
    b_cc = tl.zeros([BLOCK], dtype=tl.float32)
    b_dc = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(start, end, BLOCK):
        o_row = begin + tl.arange(0, BLOCK)
        m_row = o_row < end
        b_c = tl.load(p_cond + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_d = load_direction(b_c, p_uncond, p_buffer, o_row, m_row, momentum)
        b_dd += b_d * b_d
        b_cc += b_c * b_c
        b_dc += b_d * b_c
    factor = 1.0
    if THRESHOLD:
        # min(1, threshold / |d|), which is 1 for |d| = 0
        norm_d = tl.sqrt_rn(tl.sum(b_dd))
        factor = tl.where(norm_d > threshold, tl.div_rn(threshold, tl.maximum(norm_d, threshold)), 1.0)
    norm_c = tl.maximum(tl.sqrt_rn(tl.sum(b_cc)), 1e-12)
    return factor, factor * tl.div_rn(tl.div_rn(tl.sum(b_dc), norm_c), norm_c)


def flow_step_triton(tensors, rows, numbers, x_next, momentum_next):
    """Fills x_next and momentum_next (or None) from flat, contiguous tensors; a prefix comes with its offsets."""
    total = x_next.numel()
    length = total // rows
    apg = numbers.guidance == GUIDANCE_APG
    splits = 1 if apg else max(1, triton.cdiv(length, BLOCK * BLOCKS_EACH))
    noisy = 0.0 if tensors.prefix_noise is None else numbers.prefix_time
    with torch.cuda.device_of(x_next):
        flow_step_kernel[(rows, splits)](
            tensors.x,
            tensors.v_cond,
            tensors.v_uncond,
            tensors.momentum_buffer if numbers.momentum else None,
            tensors.row_offsets,
            tensors.prefix,
            tensors.prefix_offsets,
            tensors.prefix_noise,
            x_next,
            momentum_next,
            total,
            length,
            numbers.dt,
            numbers.scale - 1,
            numbers.threshold,
            1 - numbers.eta,
            numbers.momentum,
            1 - noisy,
            noisy,
            CFG=numbers.guidance == GUIDANCE_CFG,
            APG=apg,
            THRESHOLD=numbers.threshold > 0,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )

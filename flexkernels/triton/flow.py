"""One guided flow update in Triton: a program per row, read twice where guidance needs sums over it, else once.

With c = v_cond, d = c - v_uncond + momentum * buffer:
    v = alpha * c + beta * d
    CFG: alpha = 1, beta = scale - 1, both times rescale * std(c) / std(v) + 1 - rescale
    APG: s = min(1, threshold / |d|), p = s * d.c / max(|c|, 1e-12)^2,
         alpha = 1 - (scale - 1) * (1 - eta) * p, beta = (scale - 1) * s
    x_next = sum a_i x_i + b * v + sum past_b_j past_j
and the first elements of the row become (1 - prefix_time) * prefix + prefix_time * prefix_noise
"""

import torch
import triton
import triton.language as tl

from ..flow_math import GUIDANCE_APG, MAX_TERMS, NO_GUIDANCE, count_rows, empty_results, split, used_terms

BLOCK = 512
NUM_WARPS = 4
# blocks that one program of an update without row sums goes through
BLOCKS_EACH = 8


@triton.jit
def flow_update_kernel(
    p_x,
    p_x1,
    p_x2,
    p_past0,
    p_past1,
    p_past2,
    p_cond,
    p_uncond,
    p_buffer,
    p_row_offsets,
    p_prefix,
    p_prefix_offsets,
    p_prefix_noise,
    p_scalars,
    p_x_next,
    p_momentum,
    p_velocity,
    total,
    length,
    prefix_length,
    a0,
    a1,
    a2,
    b,
    past_b0,
    past_b1,
    past_b2,
    scale,
    threshold,
    shed,
    momentum,
    rescale,
    prefix_time,
    APG: tl.constexpr,
    THRESHOLD: tl.constexpr,
    RESCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # shed = 1 - eta
    if p_scalars is not None:
        a0, a1, a2 = tl.load(p_scalars), tl.load(p_scalars + 1), tl.load(p_scalars + 2)
        b = tl.load(p_scalars + 3)
        past_b0, past_b1, past_b2 = tl.load(p_scalars + 4), tl.load(p_scalars + 5), tl.load(p_scalars + 6)
        scale, prefix_time = tl.load(p_scalars + 7), tl.load(p_scalars + 8)
    gain = scale - 1.0
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    end = start + length
    if p_row_offsets is not None:
        # offsets out of range must not reach foreign memory
        start = tl.maximum(tl.load(p_row_offsets + row), 0)
        end = tl.minimum(tl.load(p_row_offsets + row + 1), total)
    prefix_start = row * prefix_length
    prefix_end = prefix_start + prefix_length
    if p_prefix_offsets is not None:
        prefix_start = tl.load(p_prefix_offsets + row)
        prefix_end = tl.load(p_prefix_offsets + row + 1)
    alpha, beta = 1.0, gain
    if APG:
        factor, parallel = apg_factors(p_cond, p_uncond, p_buffer, start, end, threshold, momentum, THRESHOLD, BLOCK)
        alpha, beta = 1.0 - gain * shed * parallel, gain * factor
    if RESCALE:
        alpha = rescale_factor(p_cond, p_uncond, start, end, gain, rescale, BLOCK)
        beta = alpha * gain
    for begin in range(start + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        o_row = begin + tl.arange(0, BLOCK)
        m_row = o_row < end
        b_c = tl.load(p_cond + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_v = alpha * b_c
        if p_uncond is not None:
            b_d = load_direction(b_c, p_uncond, p_buffer, o_row, m_row, momentum)
            b_v += beta * b_d
            if p_momentum is not None:
                tl.store(p_momentum + o_row, b_d, mask=m_row)
        if p_velocity is not None:
            tl.store(p_velocity + o_row, b_v, mask=m_row)
        b_x = add_term(b * b_v, p_x, a0, o_row, m_row, False)
        b_x = add_term(b_x, p_x1, a1, o_row, m_row, p_scalars is not None)
        b_x = add_term(b_x, p_x2, a2, o_row, m_row, p_scalars is not None)
        b_x = add_term(b_x, p_past0, past_b0, o_row, m_row, p_scalars is not None)
        b_x = add_term(b_x, p_past1, past_b1, o_row, m_row, p_scalars is not None)
        b_x = add_term(b_x, p_past2, past_b2, o_row, m_row, p_scalars is not None)
        if p_prefix is not None:
            o_prefix = prefix_start + o_row - start
            m_prefix = m_row & (o_prefix < prefix_end)
            b_prefix = tl.load(p_prefix + o_prefix, mask=m_prefix, other=0.0)
            if p_prefix_noise is not None:
                b_noise = tl.load(p_prefix_noise + o_prefix, mask=m_prefix, other=0.0)
                b_prefix = (1.0 - prefix_time) * b_prefix + prefix_time * b_noise
            b_x = tl.where(m_prefix, b_prefix, b_x)
        tl.store(p_x_next + o_row, b_x.to(p_x_next.dtype.element_ty), mask=m_row)


@triton.jit
def add_term(b_sum, p_term, weight, o_row, m_row, SCALARS: tl.constexpr):
    """b_sum + weight * term, where there is a term; a weight from the device may be 0: the term is then not read."""
    if p_term is not None:
        if SCALARS:
            # compared as a block, which the interpreter can combine with another
            m_row = m_row & (tl.zeros_like(b_sum) + weight != 0)
        b_sum += weight * tl.load(p_term + o_row, mask=m_row, other=0.0).to(tl.float32)
    return b_sum


@triton.jit
def load_direction(b_c, p_uncond, p_buffer, o_row, m_row, momentum):
    """d = c - v_uncond + momentum * buffer, 0 beyond the row where c is."""
    b_d = b_c - tl.load(p_uncond + o_row, mask=m_row, other=0.0).to(tl.float32)
    if p_buffer is not None:
        b_d += momentum * tl.load(p_buffer + o_row, mask=m_row, other=0.0)
    return b_d


@triton.jit
def apg_factors(
    p_cond, p_uncond, p_buffer, start, end, threshold, momentum, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr
):
    """s = min(1, threshold / |d|) and p = s * d.c / max(|c|, 1e-12)^2 of one row; float32 sums are added in float64."""
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
        norm_d = tl.sqrt(tl.sum(b_dd.to(tl.float64))).to(tl.float32)
        factor = tl.where(norm_d > threshold, tl.div_rn(threshold, tl.maximum(norm_d, threshold)), 1.0)
    norm_c = tl.maximum(tl.sqrt(tl.sum(b_cc.to(tl.float64))), 1e-12)
    along = tl.sum(b_dc.to(tl.float64)) / norm_c / norm_c
    return factor, factor * along.to(tl.float32)


@triton.jit
def rescale_factor(p_cond, p_uncond, start, end, gain, rescale, BLOCK: tl.constexpr):
    """rescale * std(c) / std(v) + 1 - rescale of one row, from sums over c and v less their first element."""
    m_first = start < end
    first_c = tl.load(p_cond + start, mask=m_first, other=0.0).to(tl.float32)
    first_u = tl.load(p_uncond + start, mask=m_first, other=0.0).to(tl.float32)
    first_v = first_c + gain * (first_c - first_u)
    b_c1 = tl.zeros([BLOCK], dtype=tl.float32)
    b_c2 = tl.zeros([BLOCK], dtype=tl.float32)
    b_v1 = tl.zeros([BLOCK], dtype=tl.float32)
    b_v2 = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(start, end, BLOCK):
        o_row = begin + tl.arange(0, BLOCK)
        m_row = o_row < end
        b_c = tl.load(p_cond + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_u = tl.load(p_uncond + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_v = tl.where(m_row, b_c + gain * (b_c - b_u) - first_v, 0.0)
        b_c = tl.where(m_row, b_c - first_c, 0.0)
        b_c1 += b_c
        b_c2 += b_c * b_c
        b_v1 += b_v
        b_v2 += b_v * b_v
    count = tl.maximum(end - start, 1).to(tl.float64)
    c1 = tl.sum(b_c1.to(tl.float64))
    v1 = tl.sum(b_v1.to(tl.float64))
    square_c = tl.maximum(tl.sum(b_c2.to(tl.float64)) - c1 * (c1 / count), 0.0)
    square_v = tl.sum(b_v2.to(tl.float64)) - v1 * (v1 / count)
    # not where it is NaN, which spreads over the row
    constant = square_v <= 0
    ratio = tl.where(constant, 1.0, tl.sqrt(square_c / tl.where(constant, 1.0, square_v)))
    return rescale * ratio.to(tl.float32) + (1.0 - rescale)


def flow_update_triton(*args):
    x_next = args[0].new_empty(args[0].shape)
    return x_next, *_update(args, x_next)


def flow_update__triton(*args):
    return _update(args, args[0])


def _update(args, x_next):
    """Fills x_next, which may be x, and returns the next momentum buffer and the velocity."""
    tensors, numbers, return_velocity = split(args)
    momentum_next, velocity = empty_results(tensors, numbers, return_velocity)
    if x_next.numel():
        given = momentum_next if numbers.momentum else None, velocity if return_velocity else None
        launch_update(_contiguous(tensors), count_rows(tensors), numbers, x_next, *given)
    return momentum_next, velocity


def launch_update(tensors, rows, numbers, x_next, momentum_next, velocity):
    """Fills x_next, momentum_next and velocity (or None) from contiguous tensors of one shape."""
    total = x_next.numel()
    length = total // rows
    states, a, past, past_b = used_terms(tensors, numbers)
    apg, rescaled = numbers.guidance == GUIDANCE_APG, numbers.rescale > 0
    splits = 1 if apg or rescaled else max(1, triton.cdiv(length, BLOCK * BLOCKS_EACH))
    with torch.cuda.device_of(x_next):
        flow_update_kernel[(rows, splits)](
            *_padded(states, None),
            *_padded(past, None),
            tensors.v_cond,
            tensors.v_uncond if numbers.guidance != NO_GUIDANCE else None,
            tensors.momentum_buffer if numbers.momentum else None,
            tensors.row_offsets,
            tensors.prefix,
            tensors.prefix_offsets,
            tensors.prefix_noise,
            tensors.scalars,
            x_next,
            momentum_next,
            velocity,
            total,
            length,
            0 if tensors.prefix is None else tensors.prefix.numel() // rows,
            *_padded(a, 0.0),
            numbers.b,
            *_padded(past_b, 0.0),
            numbers.scale,
            numbers.threshold,
            1 - numbers.eta,
            numbers.momentum,
            numbers.rescale,
            numbers.prefix_time,
            APG=apg,
            THRESHOLD=numbers.threshold > 0,
            RESCALE=rescaled,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def _contiguous(tensors):
    one_each = (None if value is None else value.contiguous() for value in tensors[:9])
    return type(tensors)(*one_each, *([value.contiguous() for value in several] for several in tensors[9:]))


def _padded(values, rest):
    return [*values, *[rest] * (MAX_TERMS - len(values))]

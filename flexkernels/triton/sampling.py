"""Sampling in Triton: a program a row. Top-k and top-p are searches for one threshold on the ordered bits of x, two
bits a pass, by count and by mass.

Float arithmetic is one rounded operation at a time (no fused multiply-add), as in sampling_math.py.
"""

import torch
import triton
import triton.language as tl

from ..sampling_math import constants

BLOCK = 4096
NUM_WARPS = 16


@triton.jit
def guided(p_cond, p_uncond, o_v, vocab, guidance):
    """x of the tokens o_v, -inf beyond the vocabulary and for NaN."""
    m_v = o_v < vocab
    b_x = tl.load(p_cond + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    if p_uncond is not None:
        b_u = tl.load(p_uncond + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_x = b_u + guidance * (b_x - b_u)
    # -0 becomes 0
    return tl.where(m_v & (b_x == b_x), b_x, float("-inf")) + 0.0


@triton.jit
def ordered(b_x):
    """Integers in the order of floats."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def exponent(b_x, largest, scale):
    return tl.where(b_x == largest, 0.0, (b_x - largest) * scale)


@triton.jit
def exp2(b_y):
    """2^y for y <= 0, and 0 below 2^-126."""
    b_at = tl.where(b_y > -126.0, b_y, -126.0)
    b_whole = (b_at + 12582912.0) - 12582912.0
    b_f = b_at - b_whole
    b_r = b_f * 1.5353362e-4 + 1.33988738e-3
    b_r = b_r * b_f + 9.61843692e-3
    b_r = b_r * b_f + 5.55033237e-2
    b_r = b_r * b_f + 2.40226477e-1
    b_r = b_r * b_f + 6.93147182e-1
    b_r = b_r * b_f + 1.0
    b_power = ((b_whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(b_y >= -126.0, b_r * b_power, 0.0)


@triton.jit
def log1p(b_f):
    """log(1 + f) for f in [-1/4, 1/2]."""
    b_q = b_f * -4.50748056e-2 + 1.04630224e-1
    b_q = b_q * b_f + -1.31611928e-1
    b_q = b_q * b_f + 1.44783944e-1
    b_q = b_q * b_f + -1.66473120e-1
    b_q = b_q * b_f + 1.99908614e-1
    b_q = b_q * b_f + -2.50000954e-1
    b_q = b_q * b_f + 3.33334506e-1
    b_square = b_f * b_f
    return b_f + ((b_f * b_square) * b_q + b_square * -0.5)


@triton.jit
def log(b_v):
    """log(v) for normal v > 0."""
    b_bits = b_v.to(tl.int32, bitcast=True)
    b_exponent = (b_bits - 0x3F400000) >> 23
    b_f = (b_bits - (b_exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return b_exponent.to(tl.float32) * 6.93147182e-1 + log1p(b_f)


@triton.jit
def exponential(b_bits):
    """-log(1 - u) with u = (bits + 1/2) / 2^31."""
    b_u = (b_bits.to(tl.float32) + 0.5) * 4.656612873077393e-10
    b_rest = ((0x7FFFFFFF - b_bits).to(tl.float32) + 0.5) * 4.656612873077393e-10
    return tl.where(b_u <= 0.25, -log1p(tl.where(b_u <= 0.25, -b_u, -0.25)), -log(b_rest))


@triton.jit
def mass(b_weight):
    return (b_weight * 1099511627776.0).to(tl.int64)


@triton.jit
def threshold(p_cond, p_uncond, vocab, guidance, largest, scale, low, needed, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest order from which on the amounts of values >= low reach `needed`, or order -2^31."""
    base = tl.full([], -2147483648, dtype=tl.int64)
    for i in range(16):
        step = tl.full([], 1, dtype=tl.int64) << (30 - 2 * i)
        first = (base + step).to(tl.int32)
        second = (base + 2 * step).to(tl.int32)
        third = (base + 3 * step).to(tl.int32)
        b_first = tl.zeros([BLOCK], dtype=tl.int64)
        b_second = tl.zeros([BLOCK], dtype=tl.int64)
        b_third = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(0, vocab, BLOCK):
            b_x = guided(p_cond, p_uncond, start + tl.arange(0, BLOCK), vocab, guidance)
            b_order = ordered(b_x)
            b_amount = (b_order >= low).to(tl.int64)
            if MASS:
                b_amount *= mass(exp2(exponent(b_x, largest, scale)))
            b_first += tl.where(b_order >= first, b_amount, 0)
            b_second += tl.where(b_order >= second, b_amount, 0)
            b_third += tl.where(b_order >= third, b_amount, 0)
        passed = (tl.sum(b_first) >= needed).to(tl.int64) + (tl.sum(b_second) >= needed).to(tl.int64)
        base += (passed + (tl.sum(b_third) >= needed).to(tl.int64)) * step
    return base.to(tl.int32)


@triton.jit
def total_mass(p_cond, p_uncond, vocab, guidance, largest, scale, low, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, vocab, BLOCK):
        b_x = guided(p_cond, p_uncond, start + tl.arange(0, BLOCK), vocab, guidance)
        b_sum += tl.where(ordered(b_x) >= low, mass(exp2(exponent(b_x, largest, scale))), 0)
    return tl.sum(b_sum)


@triton.jit(do_not_specialize=["top_k", "top_p", "seed", "offset"])
def sample_logits_kernel(
    p_logits,
    p_uncond,
    p_seeds,
    p_offsets,
    p_ids,
    p_logprob,
    logits_stride,
    uncond_stride,
    vocab,
    guidance,
    scale,
    log2_minp,
    top_k,
    top_p,
    seed,
    offset,
    ARGMAX: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    p_cond = p_logits + row.to(tl.int64) * logits_stride
    if p_uncond is not None:
        p_uncond += row.to(tl.int64) * uncond_stride

    b_largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_index = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = guided(p_cond, p_uncond, o_v, vocab, guidance)
        b_index = tl.where(b_x > b_largest, o_v, b_index)
        b_largest = tl.maximum(b_largest, b_x)
    largest = tl.max(b_largest, axis=0)
    blank = largest == float("-inf")
    if ARGMAX:
        # every slot holds the first of its own largest ones
        first = tl.min(tl.where(b_largest == largest, b_index, 0x7FFFFFFF), axis=0)
        tl.store(p_ids + row, tl.where(blank, 0, first).to(tl.int64))
        if p_logprob is not None:
            tl.store(p_logprob + row, tl.where(blank, float("nan"), 0.0))
    else:
        # the lowest finite number
        low = tl.full([], -2139095040, dtype=tl.int32)
        if TOP_K:
            found = threshold(p_cond, p_uncond, vocab, guidance, largest, scale, low, top_k, False, BLOCK)
            low = tl.maximum(low, found)
        if TOP_P:
            total = total_mass(p_cond, p_uncond, vocab, guidance, largest, scale, low, BLOCK)
            high = (total >> 30) * top_p
            needed = tl.maximum(high + (((total & 0x3FFFFFFF) * top_p) >> 30), 1)
            found = threshold(p_cond, p_uncond, vocab, guidance, largest, scale, low, needed, True, BLOCK)
            low = tl.maximum(low, found)

        if p_seeds is not None:
            key = tl.load(p_seeds + row)
            stream = row * 0
        else:
            key = seed.to(tl.int64)
            stream = row
        step = offset.to(tl.int64)
        if p_offsets is not None:
            step = tl.load(p_offsets + row)
        step_low = (step & 0xFFFFFFFF).to(tl.uint32)
        step_high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)

        # a slot takes Philox blocks, each of which serves four tokens in rising order
        b_best = tl.full([BLOCK // 4], float("inf"), dtype=tl.float32)
        b_id = tl.full([BLOCK // 4], 0x7FFFFFFF, dtype=tl.int32)
        b_sum = tl.zeros([BLOCK // 4], dtype=tl.int64)
        for start in range(0, tl.cdiv(vocab, 64) * 16, BLOCK // 4):
            o_block = start + tl.arange(0, BLOCK // 4)
            words = tl.philox(key, o_block, stream, step_low, step_high)
            for j in tl.static_range(4):
                o_v = (o_block // 16) * 64 + 16 * j + o_block % 16
                b_x = guided(p_cond, p_uncond, o_v, vocab, guidance)
                b_y = exponent(b_x, largest, scale)
                m_kept = (ordered(b_x) >= low) & (b_y >= log2_minp)
                b_weight = tl.where(m_kept, exp2(b_y), 0.0)
                b_sum += mass(b_weight)
                b_time = exponential((words[j] >> 1).to(tl.int32))
                b_time = tl.where(b_weight > 0, tl.div_rn(b_time, tl.where(b_weight > 0, b_weight, 1.0)), float("inf"))
                b_id = tl.where(b_time < b_best, o_v, b_id)
                b_best = tl.minimum(b_best, b_time)
        best = tl.min(b_best, axis=0)
        drawn = tl.min(tl.where(b_best == best, b_id, 0x7FFFFFFF), axis=0)
        drawn = tl.where(blank, 0, drawn)
        tl.store(p_ids + row, drawn.to(tl.int64))
        if p_logprob is not None:
            b_drawn = drawn + tl.arange(0, 16) * 0
            b_y = exponent(guided(p_cond, p_uncond, b_drawn, vocab, guidance), largest, scale)
            sum_all = tl.where(blank, 1, tl.sum(b_sum)).to(tl.float32) * 9.094947017729282e-13
            logprob = tl.max(b_y, axis=0) * 6.93147182e-1 - log(sum_all)
            tl.store(p_logprob + row, tl.where(blank, float("nan"), logprob))


def sample_logits_triton(
    logits, uncond, guidance, temperature, top_k, top_p, min_p, seed, seeds, offset, offsets, return_logprob
):
    n, vocab = logits.shape
    ids = logits.new_empty((n,), dtype=torch.int64)
    logprob = logits.new_empty((n if return_logprob else 0,), dtype=torch.float32)
    if n == 0:
        return ids, logprob
    logits, uncond = _dense(logits), _dense(uncond)
    seeds, offsets = (None if values is None else values.contiguous() for values in (seeds, offsets))
    guidance, scale, top_k, top_p, log2_minp = constants(guidance, temperature, top_k, top_p, min_p, vocab)
    block = min(BLOCK, max(64, triton.next_power_of_2(vocab)))
    with torch.cuda.device_of(logits):
        sample_logits_kernel[(n,)](
            logits,
            uncond,
            seeds,
            offsets,
            ids,
            logprob if return_logprob else None,
            logits.stride(0),
            0 if uncond is None else uncond.stride(0),
            vocab,
            guidance,
            scale,
            log2_minp,
            top_k,
            top_p,
            seed,
            offset,
            ARGMAX=scale == 0,
            TOP_K=top_k < vocab,
            TOP_P=top_p > 0,
            BLOCK=block,
            num_warps=NUM_WARPS if block == BLOCK else 4,
            enable_fp_fusion=False,
        )
    return ids, logprob


def _dense(rows):
    """Rows contiguous, whatever lies between them."""
    return rows if rows is None or rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()

"""Structured variable-length attention in Triton, forward and backward, over tiles that a plan lists.

    S = scale * q k^T + w,  P = exp(S - lse) over visible keys,  out = P v,  lse = log sum exp S
    D = rowsum(dO * out),  dS = P * (dO v^T - D),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T dO

Forward and dq: a program per (query tile, head). dk and dv: a program per (key tile, kv head), which sums over its
query heads and rows itself, so nothing is atomic and every result is repeatable. The heads of one tile are neighbours
in the grid: they share the plan's entry and, in a group, their keys. Exponentials are base 2: log2(e) is in scale, w.

A tile lists ranges of the other side, first those that are visible throughout, then those that need the predicate. A
range may be longer than a step; what is left of a full one after whole steps goes the way of the partial ones.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import library

CAUSAL = tl.constexpr(1)
FRAME_CAUSAL = tl.constexpr(2)
FRAME_CAUSAL_PREFIX = tl.constexpr(3)
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))
INT_MAX = tl.constexpr(2**31 - 1)

# their alignment depends on lengths, which must not compile anything anew
METADATA = (
    *("p_q_frame", "p_q_rank", "p_k_frame", "p_k_rank", "p_cu_q", "p_cu_k", "p_tiles", "p_ptr", "p_ranges"),
    *("p_weight", "p_lse", "p_delta", "p_norm"),
)


class Loop(NamedTuple):
    """How one kernel walks a range: rows or keys a step, warps, pipeline stages."""

    step: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Query rows and keys of one program, and the three kernels' loops."""

    block_q: int
    block_k: int
    forward: Loop
    dq: Loop
    dkdv: Loop


# by whether elements have two bytes, then by padded head_dim
TILES = {
    True: {
        64: Tiles(128, 64, Loop(64, 8, 2), Loop(32, 8, 2), Loop(32, 4, 2)),
        128: Tiles(128, 64, Loop(64, 8, 2), Loop(32, 8, 2), Loop(32, 8, 2)),
        256: Tiles(32, 32, Loop(32, 4, 2), Loop(32, 4, 1), Loop(32, 8, 1)),
    },
    False: {
        64: Tiles(32, 32, Loop(32, 8, 2), Loop(16, 4, 1), Loop(16, 4, 2)),
        128: Tiles(32, 32, Loop(16, 8, 1), Loop(16, 8, 1), Loop(16, 8, 1)),
        256: Tiles(32, 32, Loop(16, 8, 1), Loop(16, 8, 1), Loop(16, 8, 1)),
    },
}


def tiles_of(dtype: torch.dtype, head_dim: int) -> Tiles:
    """The block sizes to launch with; a planned tile that is larger is served by several programs."""
    return TILES[dtype.itemsize == 2][max(64, triton.next_power_of_2(head_dim))]


@triton.jit
def load_tile(p_tiles, p_ptr, index, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, last) of one of the PARTS blocks of a planned tile, and its ranges; a block beyond it has none."""
    tile = index // PARTS
    sequence, end = tl.load(p_tiles + 4 * tile), tl.load(p_tiles + 4 * tile + 2)
    first = tl.load(p_tiles + 4 * tile + 1) + index % PARTS * BLOCK
    range_first = tl.load(p_ptr + tile)
    fulls = tl.where(first < end, tl.load(p_tiles + 4 * tile + 3), 0)
    range_last = tl.where(first < end, tl.load(p_ptr + tile + 1), range_first)
    return sequence, first, tl.minimum(first + BLOCK, end), range_first, fulls, range_last


@triton.jit
def load_block(p, o, m_row, m_dim, MASKED: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr):
    """Rows of q, k, v or dO as an operand of tl.dot: zeros beyond the rows, and beyond head_dim."""
    if MASKED and PADDED:
        b = tl.load(p + o, mask=m_row[:, None] & m_dim[None, :], other=0.0)
    elif MASKED:
        b = tl.load(p + o, mask=m_row[:, None], other=0.0)
    elif PADDED:
        b = tl.load(p + o, mask=m_dim[None, :], other=0.0)
    else:
        b = tl.load(p + o)
    return b.to(DOT)


@triton.jit
def query_terms(p_frame, p_rank, o_q, m_q, shift, MASK: tl.constexpr, CROSS: tl.constexpr):
    """What decides which keys a query sees: its frame and rank and the ranks it sees in earlier frames, or, where
    position decides, its last key."""
    if MASK == FRAME_CAUSAL_PREFIX:
        b_frame = tl.load(p_frame + o_q, mask=m_q, other=0)
        b_rank = tl.load(p_rank + o_q, mask=m_q, other=0)
        # prefix keys have rank -1; a switch: 0 none, 1 full, 2 causal
        b_low = tl.where(b_rank < 0, -CROSS[0], -CROSS[2])
        b_high = tl.where(b_rank < 0, INT_MAX if CROSS[1] else -1, INT_MAX if CROSS[3] == 1 else -1)
        if CROSS[3] == 2:
            b_high = tl.where(b_rank < 0, b_high, b_rank)
        terms = b_frame, b_rank, b_low, b_high
    elif MASK == FRAME_CAUSAL:
        terms = (tl.load(p_frame + o_q, mask=m_q, other=0),)
    else:
        terms = (o_q + shift,)
    return terms


@triton.jit
def key_terms(p_frame, p_rank, o_k, m_k, MASK: tl.constexpr):
    if MASK == FRAME_CAUSAL_PREFIX:
        terms = tl.load(p_frame + o_k, mask=m_k, other=0), tl.load(p_rank + o_k, mask=m_k, other=0)
    elif MASK == FRAME_CAUSAL:
        terms = (tl.load(p_frame + o_k, mask=m_k, other=0),)
    else:
        terms = (o_k,)
    return terms


@triton.jit
def sees(query, key, m, MASK: tl.constexpr, CROSS: tl.constexpr):
    """The mask predicate, where m; terms of queries and keys broadcast against each other."""
    if MASK == FRAME_CAUSAL_PREFIX:
        earlier = key[0] < query[0]
        if CROSS[0] != 1 or CROSS[1] != 1 or CROSS[2] != 1 or CROSS[3] != 1:
            earlier = earlier & (key[1] >= query[2]) & (key[1] <= query[3])
        m = m & (earlier | ((key[0] == query[0]) & (key[1] <= query[1])))
    elif MASK == CAUSAL or MASK == FRAME_CAUSAL:  # noqa: SIM109
        m = m & (key[0] <= query[0])
    return m


@triton.jit
def causal_shift(p_cu_q, p_cu_k, sequence, MASK: tl.constexpr):
    """What takes a row to the last key it sees: the ends of queries and keys are aligned."""
    shift = 0
    if MASK == CAUSAL:
        shift = tl.load(p_cu_k + sequence + 1) - tl.load(p_cu_q + sequence + 1)
    return shift


@triton.jit
def add_weight(b_s, p_weight, o_k, m_k):
    if p_weight is not None:
        b_s += LOG2_E * tl.load(p_weight + o_k, mask=m_k, other=0.0)
    return b_s


@triton.jit
def attention_step(
    b_q, b_acc, b_max, b_sum, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame, p_k_rank, stride_k, stride_v,
    key, end, scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, CROSS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys key .. key + STEP."""
    o_k = key + tl.arange(0, STEP)
    m_k = o_k < end
    b_k = load_block(p_k + tl.cast(key, tl.int64) * stride_k, o_kd, m_k, m_dim, MASKED, PADDED, DOT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if MASKED or p_weight is not None:
        b_s = add_weight(b_s * scale, p_weight, o_k[None, :], m_k[None, :])
        if MASKED:
            terms = key_terms(p_k_frame, p_k_rank, o_k[None, :], m_k[None, :], MASK)
            b_s = tl.where(sees(query, terms, m_k[None, :], MASK, CROSS), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # a row without any key so far: exp2(-inf - 0) = 0
        b_from = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_from[:, None])
    else:
        # scale >= 0 commutes with max
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_from = b_new
        b_p = tl.exp2(b_s * scale - b_from[:, None])
    b_shrink = tl.exp2(b_max - b_from)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_v = load_block(p_v + tl.cast(key, tl.int64) * stride_v, o_vd, m_k, m_dim, MASKED, PADDED, DOT)
    b_acc = tl.dot(b_p.to(DOT), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize_on_alignment=METADATA)
def attention_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_weight, p_q_frame, p_q_rank, p_k_frame, p_k_rank, p_cu_q, p_cu_k,
    p_tiles, p_ptr, p_ranges,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    heads, group, scale,
    MASK: tl.constexpr, CROSS: tl.constexpr, NEGATIVE: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # q [BLOCK_Q, BLOCK_D], k and v [STEP, BLOCK_D]; scale >= 0, its sign is NEGATIVE
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    # later rows see more keys: they go first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = (program % heads).to(tl.int64)
    sequence, first, last, range_first, fulls, range_last = load_tile(p_tiles, p_ptr, program // heads, PARTS, BLOCK_Q)
    o_d, o_step = tl.arange(0, BLOCK_D), tl.arange(0, STEP).to(tl.int64)
    o_q = first + tl.arange(0, BLOCK_Q)
    m_dim, m_q = o_d < HEAD_DIM, o_q < last
    b_q = load_block(p_q + head * stride_qh, o_q.to(tl.int64)[:, None] * stride_q + o_d, m_q, m_dim, True, PADDED, DOT)
    if NEGATIVE:
        b_q = -b_q
    p_k += head // group * stride_kh
    p_v += head // group * stride_vh
    o_kd, o_vd = o_step[:, None] * stride_k + o_d, o_step[:, None] * stride_v + o_d
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for i in range(range_first, range_first + fulls):
        begin, end = tl.load(p_ranges + 3 * i), tl.load(p_ranges + 3 * i + 1)
        for key in range(begin, end - STEP + 1, STEP):
            b_acc, b_max, b_sum = attention_step(
                b_q, b_acc, b_max, b_sum, None, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame, p_k_rank,
                stride_k, stride_v, key, end, scale, False, MASK, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
    shift = causal_shift(p_cu_q, p_cu_k, sequence, MASK)
    query = query_terms(p_q_frame, p_q_rank, o_q[:, None], m_q[:, None], shift, MASK, CROSS)
    for i in range(range_first, range_last):
        begin, end = tl.load(p_ranges + 3 * i), tl.load(p_ranges + 3 * i + 1)
        begin = tl.where(i < range_first + fulls, end - (end - begin) % STEP, begin)
        for key in range(begin, end, STEP):
            b_acc, b_max, b_sum = attention_step(
                b_q, b_acc, b_max, b_sum, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame, p_k_rank,
                stride_k, stride_v, key, end, scale, True, MASK, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_out = (o_q.to(tl.int64)[:, None] * heads + head) * HEAD_DIM + o_d
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q[:, None] & m_dim)
    if p_lse is not None:
        tl.store(p_lse + o_q.to(tl.int64) * heads + head, b_max * LN_2 + tl.log(b_sum), mask=m_q)


@triton.jit
def load_lse(p_lse, o, m):
    """Base 2; infinite for a row that sees nothing, so that its P = exp2(S - lse) is 0."""
    b_lse = tl.load(p_lse + o, mask=m, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)


@triton.jit
def dq_step(
    b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame, p_k_rank,
    stride_k, stride_v, key, end, scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, CROSS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    o_k = key + tl.arange(0, STEP)
    m_k = o_k < end
    b_k = load_block(p_k + tl.cast(key, tl.int64) * stride_k, o_kd, m_k, m_dim, MASKED, PADDED, DOT)
    b_v = load_block(p_v + tl.cast(key, tl.int64) * stride_v, o_vd, m_k, m_dim, MASKED, PADDED, DOT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    b_p = tl.exp2(add_weight(b_s, p_weight, o_k[None, :], m_k[None, :]) - b_lse[:, None])
    if MASKED:
        terms = key_terms(p_k_frame, p_k_rank, o_k[None, :], m_k[None, :], MASK)
        b_p = tl.where(sees(query, terms, m_k[None, :], MASK, CROSS), b_p, 0.0)
    if p_norm is not None:
        b_sum += tl.sum(b_p, 1)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(DOT)
    return tl.dot(b_ds, b_k, b_dq, input_precision="ieee"), b_sum


@triton.jit(do_not_specialize_on_alignment=METADATA)
def attention_dq_kernel(
    p_do, p_q, p_k, p_v, p_out, p_lse, p_delta, p_norm, p_dq, p_weight, p_q_frame, p_q_rank, p_k_frame, p_k_rank,
    p_cu_q, p_cu_k, p_tiles, p_ptr, p_ranges,
    stride_do, stride_doh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_dq, stride_dqh,
    heads, group, scale, scale_log2,
    MASK: tl.constexpr, CROSS: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # q, dO, out, dq [BLOCK_Q, BLOCK_D], k and v [STEP, BLOCK_D]; D and 1 / sum P go to p_delta and p_norm
    # [total_q, heads] for dk
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    # later rows see more keys: they go first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = (program % heads).to(tl.int64)
    sequence, first, last, range_first, fulls, range_last = load_tile(p_tiles, p_ptr, program // heads, PARTS, BLOCK_Q)
    o_d, o_step = tl.arange(0, BLOCK_D), tl.arange(0, STEP).to(tl.int64)
    o_q = first + tl.arange(0, BLOCK_Q)
    o_row = o_q.to(tl.int64)
    m_dim, m_q = o_d < HEAD_DIM, o_q < last
    p_do += head * stride_doh
    p_q += head * stride_qh
    p_k += head // group * stride_kh
    p_v += head // group * stride_vh
    b_do = load_block(p_do, o_row[:, None] * stride_do + o_d, m_q, m_dim, True, PADDED, DOT)
    b_out = tl.load(p_out + (o_row[:, None] * heads + head) * HEAD_DIM + o_d, mask=m_q[:, None] & m_dim, other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + o_row * heads + head, b_delta, mask=m_q)
    b_lse = load_lse(p_lse, o_row * heads + head, m_q)
    b_q = load_block(p_q, o_row[:, None] * stride_q + o_d, m_q, m_dim, True, PADDED, DOT)
    o_kd, o_vd = o_step[:, None] * stride_k + o_d, o_step[:, None] * stride_v + o_d
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for i in range(range_first, range_first + fulls):
        begin, end = tl.load(p_ranges + 3 * i), tl.load(p_ranges + 3 * i + 1)
        for key in range(begin, end - STEP + 1, STEP):
            b_dq, b_sum = dq_step(
                b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, None, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame,
                p_k_rank, stride_k, stride_v, key, end, scale_log2, False, MASK, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
    shift = causal_shift(p_cu_q, p_cu_k, sequence, MASK)
    query = query_terms(p_q_frame, p_q_rank, o_q[:, None], m_q[:, None], shift, MASK, CROSS)
    for i in range(range_first, range_last):
        begin, end = tl.load(p_ranges + 3 * i), tl.load(p_ranges + 3 * i + 1)
        begin = tl.where(i < range_first + fulls, end - (end - begin) % STEP, begin)
        for key in range(begin, end, STEP):
            b_dq, b_sum = dq_step(
                b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame,
                p_k_rank, stride_k, stride_v, key, end, scale_log2, True, MASK, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
    if p_norm is not None:
        # lse is rounded: its P does not quite sum to 1
        b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
        tl.store(p_norm + o_row * heads + head, b_norm, mask=m_q)
        b_dq *= b_norm[:, None]
    o_dq = head * stride_dqh + o_row[:, None] * stride_dq + o_d
    tl.store(p_dq + o_dq, (scale * b_dq).to(p_dq.dtype.element_ty), mask=m_q[:, None] & m_dim)


@triton.jit
def dkdv_step(
    b_k, b_v, b_dk, b_dv, b_weight, keys, m_key, p_do, p_q, p_lse, p_delta, p_norm, head, o_dod, o_qd, m_dim, p_q_frame,
    p_q_rank, stride_do, stride_q, heads, shift, row, end, scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, CROSS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Everything transposed: S^T, P^T and dS^T are [BLOCK_K, STEP]."""
    o_q = row + tl.arange(0, STEP)
    m_q = o_q < end
    b_q = load_block(p_q + tl.cast(row, tl.int64) * stride_q, o_qd, m_q, m_dim, MASKED, PADDED, DOT)
    b_do = load_block(p_do + tl.cast(row, tl.int64) * stride_do, o_dod, m_q, m_dim, MASKED, PADDED, DOT)
    o_head = o_q.to(tl.int64) * heads + head
    b_lse, b_delta = load_lse(p_lse, o_head, m_q), tl.load(p_delta + o_head, mask=m_q, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
    if b_weight is not None:
        b_s += b_weight[:, None]
    b_p = tl.exp2(b_s - b_lse[None, :])
    if p_norm is not None:
        b_p *= tl.load(p_norm + o_head, mask=m_q, other=0.0)[None, :]
    if MASKED:
        query = query_terms(p_q_frame, p_q_rank, o_q[None, :], m_q[None, :], shift, MASK, CROSS)
        b_p = tl.where(sees(query, keys, m_key & m_q[None, :], MASK, CROSS), b_p, 0.0)
    b_dv = tl.dot(b_p.to(DOT), b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(DOT)
    return tl.dot(b_ds, b_q, b_dk, input_precision="ieee"), b_dv


@triton.jit(do_not_specialize_on_alignment=METADATA)
def attention_dkdv_kernel(
    p_do, p_q, p_k, p_v, p_lse, p_delta, p_norm, p_dk, p_dv, p_weight, p_q_frame, p_q_rank, p_k_frame, p_k_rank,
    p_cu_q, p_cu_k, p_tiles, p_ptr, p_ranges,
    stride_do, stride_doh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_dk, stride_dkh,
    stride_dv, stride_dvh, kv_heads, group, scale, scale_log2,
    MASK: tl.constexpr, CROSS: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # k, v, dk, dv [BLOCK_K, BLOCK_D], q and dO [STEP, BLOCK_D]
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    sequence, first, last, range_first, fulls, range_last = load_tile(
        p_tiles, p_ptr, tl.program_id(0) // kv_heads, PARTS, BLOCK_K
    )
    o_d, o_step = tl.arange(0, BLOCK_D), tl.arange(0, STEP).to(tl.int64)
    o_k = first + tl.arange(0, BLOCK_K)
    o_row = o_k.to(tl.int64)
    m_dim, m_k = o_d < HEAD_DIM, o_k < last
    b_k = load_block(p_k + kv_head * stride_kh, o_row[:, None] * stride_k + o_d, m_k, m_dim, True, PADDED, DOT)
    b_v = load_block(p_v + kv_head * stride_vh, o_row[:, None] * stride_v + o_d, m_k, m_dim, True, PADDED, DOT)
    b_weight = None
    if p_weight is not None:
        b_weight = LOG2_E * tl.load(p_weight + o_k, mask=m_k, other=0.0)
    shift = causal_shift(p_cu_q, p_cu_k, sequence, MASK)
    keys = key_terms(p_k_frame, p_k_rank, o_k[:, None], m_k[:, None], MASK)
    o_dod, o_qd = o_step[:, None] * stride_do + o_d, o_step[:, None] * stride_q + o_d
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        p_head_do, p_head_q = p_do + head * stride_doh, p_q + head * stride_qh
        for i in range(range_first, range_first + fulls):
            begin, end = tl.load(p_ranges + 3 * i), tl.load(p_ranges + 3 * i + 1)
            for row in range(begin, end - STEP + 1, STEP):
                b_dk, b_dv = dkdv_step(
                    b_k, b_v, b_dk, b_dv, b_weight, None, None, p_head_do, p_head_q, p_lse, p_delta, p_norm,
                    head, o_dod, o_qd, m_dim, p_q_frame, p_q_rank, stride_do, stride_q, kv_heads * group, shift, row,
                    end, scale_log2, False, MASK, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
        for i in range(range_first, range_last):
            begin, end = tl.load(p_ranges + 3 * i), tl.load(p_ranges + 3 * i + 1)
            begin = tl.where(i < range_first + fulls, end - (end - begin) % STEP, begin)
            for row in range(begin, end, STEP):
                b_dk, b_dv = dkdv_step(
                    b_k, b_v, b_dk, b_dv, b_weight, keys, m_k[:, None], p_head_do, p_head_q, p_lse, p_delta,
                    p_norm, head, o_dod, o_qd, m_dim, p_q_frame, p_q_rank, stride_do, stride_q, kv_heads * group,
                    shift, row, end, scale_log2, True, MASK, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
    o_dk = kv_head * stride_dkh + o_row[:, None] * stride_dk + o_d
    o_dv = kv_head * stride_dvh + o_row[:, None] * stride_dv + o_d
    tl.store(p_dk + o_dk, (scale * b_dk).to(p_dk.dtype.element_ty), mask=m_k[:, None] & m_dim)
    tl.store(p_dv + o_dv, b_dv.to(p_dv.dtype.element_ty), mask=m_k[:, None] & m_dim)


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(q, mask, cross):
    # the interpreter multiplies the bits of bfloat16: there operands are float32
    widen = library.interpreting() and q.dtype == torch.bfloat16
    dot = tl.float32 if widen else getattr(tl, str(q.dtype).removeprefix("torch."))
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    return {"MASK": mask, "CROSS": tuple(cross), "HEAD_DIM": q.shape[-1], "BLOCK_D": block_d, "DOT": dot}


def _loop(loop):
    return {"STEP": loop.step, "num_warps": loop.warps, "num_stages": loop.stages}


def attention_triton(
    q, k, v, q_frame, q_rank, k_frame, k_rank, cu_seqlens_q, cu_seqlens_k, q_tiles, k_ptr, k_tiles, key_log_weight,
    mask, cross, scale, out, lse, *, rows, tiles=None,
):  # fmt: skip
    """Fills the rows of out ``[total_q, heads, head_dim]`` and lse ``[total_q, heads]`` (or None) that the plan covers;
    rows in no tile are the caller's.

    q_tiles ``[n, 4]``: sequence, first row, end row, how many of its ranges are full; k_ptr ``[n + 1]``; k_tiles
    ``[m, 3]``: first key, end key, full; the full ones of a tile come first. ``rows``: the most that a tile holds.
    ``tiles`` replaces the choice of tiles_of.
    """
    tiles = tiles or tiles_of(q.dtype, q.shape[-1])
    if len(q_tiles) == 0:
        return
    heads, parts = q.shape[1], triton.cdiv(rows, tiles.block_q)
    with torch.cuda.device_of(q):
        attention_kernel[(len(q_tiles) * parts * heads,)](
            q, k, v, out, lse, key_log_weight, q_frame, q_rank, k_frame, k_rank, cu_seqlens_q, cu_seqlens_k,
            q_tiles, k_ptr, k_tiles, *_strides(q, k, v), heads, heads // k.shape[1], abs(scale) * LOG2_E.value,
            NEGATIVE=scale < 0, BLOCK_Q=tiles.block_q, PARTS=parts, **_constants(q, mask, cross),
            **_loop(tiles.forward),
        )  # fmt: skip


def attention_backward_triton(
    grad_out, q, k, v, out, lse, q_frame, q_rank, k_frame, k_rank, cu_seqlens_q, cu_seqlens_k, q_tiles, k_ptr, k_tiles,
    key_tiles, q_ptr, q_ranges, key_log_weight, mask, cross, scale, dq, dk, dv, *, rows, tiles=None,
):  # fmt: skip
    """Fills the rows of dq, dk and dv (last dimension contiguous) that the plans cover, always in the same order.

    key_tiles ``[n, 4]``, q_ptr ``[n + 1]``, q_ranges ``[m, 3]`` are the transposed plan: for each tile of keys, with
    the sequence and the number of full ranges as in q_tiles, the rows that see it. A key in no tile gets no gradient
    written, so keys that nothing sees need a tile without ranges. ``rows``: the most queries or keys of a tile.
    """
    tiles = tiles or tiles_of(q.dtype, q.shape[-1])
    heads, kv_heads = q.shape[1], k.shape[1]
    parts_q, parts_k = triton.cdiv(rows, tiles.block_q), triton.cdiv(rows, tiles.block_k)
    group, scale_log2 = heads // kv_heads, scale * LOG2_E.value
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if q.dtype == torch.float32 else None
    frames = (key_log_weight, q_frame, q_rank, k_frame, k_rank, cu_seqlens_q, cu_seqlens_k)
    constants = _constants(q, mask, cross)
    with torch.cuda.device_of(q):
        if len(q_tiles):
            attention_dq_kernel[(len(q_tiles) * parts_q * heads,)](
                grad_out, q, k, v, out, lse, delta, norm, dq, *frames, q_tiles, k_ptr, k_tiles,
                *_strides(grad_out, q, k, v, dq), heads, group, scale, scale_log2,
                BLOCK_Q=tiles.block_q, PARTS=parts_q, **constants, **_loop(tiles.dq),
            )  # fmt: skip
        if len(key_tiles):
            attention_dkdv_kernel[(len(key_tiles) * parts_k * kv_heads,)](
                grad_out, q, k, v, lse, delta, norm, dk, dv, *frames, key_tiles, q_ptr, q_ranges,
                *_strides(grad_out, q, k, v, dk, dv), kv_heads, group, scale, scale_log2,
                BLOCK_K=tiles.block_k, PARTS=parts_k, **constants, **_loop(tiles.dkdv),
            )  # fmt: skip

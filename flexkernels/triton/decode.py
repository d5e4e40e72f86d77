"""Decoding in Triton, float32 inside whatever comes in.

attention: each program takes one split of one kv head and sums it relative to its own maximum m with total l,
           acc = sum exp(s_j - m) v_j; a second kernel merges:  out = sum exp(m_i - m) acc_i / sum exp(m_i - m) l_i
norms:     y = weight * (x - mean) * rstd, then (low, high) -> (low cos - high sin, high cos + low sin); a head is
           handled as its two halves, the pairs of the rotary embedding
"""

import torch
import triton
import triton.language as tl

from .. import library
from ..decode import CHUNK, SPLIT

# keys of one step, at most: for one row, and for several (more spill on gfx942); the bytes they take; rows of tl.dot
BLOCK_KEYS = (64, 32)
BLOCK_BYTES = 16384
BLOCK_ROWS = 16
# elements of a program that normalises
BLOCK_ELEMENTS = 2048
NUM_WARPS = 4


@triton.jit
def decode_split_kernel(
    p_q,
    p_k,
    p_v,
    p_cache_len,
    p_weight,
    p_acc,
    p_extremes,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    stride_v_batch,
    stride_v_head,
    stride_v_token,
    scale,
    max_len,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # q [batch, N, heads, HEAD_DIM], k, v [batch, kv_heads, max_len, HEAD_DIM]
    # row r is query r // GROUP of the kv head's query head r % GROUP
    ROWS: tl.constexpr = N * GROUP
    TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    i_split, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_kv, i_tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    length = tl.minimum(tl.load(p_cache_len + i_b), max_len)
    first = i_split * SPLIT
    # the merge does not look at splits beyond the length, except the first
    if (first < length) | (i_split == 0):
        o_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < ROWS
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < HEAD_DIM
        o_query, o_head = (o_r // GROUP).to(tl.int64), (i_kv * GROUP + o_r % GROUP).to(tl.int64)
        o_q = i_b * stride_q_batch + o_query * stride_q_token + o_head * stride_q_head
        b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
        if WIDE:
            b_q = b_q.to(tl.float32)
        # [BLOCK_R] keys that each row sees
        b_visible = tl.zeros([BLOCK_R], dtype=tl.int32) + length
        if CAUSAL:
            b_visible += o_r // GROUP - N + 1

        p_k += i_b * stride_k_batch + i_kv.to(tl.int64) * stride_k_head
        p_v += i_b * stride_v_batch + i_kv.to(tl.int64) * stride_v_head
        b_m = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
        b_l = tl.zeros([BLOCK_R], dtype=tl.float32)
        b_acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for start in range(first, tl.minimum(first + SPLIT, length), BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            m_n = o_n < length
            o_kv = o_n.to(tl.int64)
            m_kv = m_n[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_kv[:, None] * stride_k_token + o_d[None, :], mask=m_kv, other=0.0)
            b_v = tl.load(p_v + o_kv[:, None] * stride_v_token + o_d[None, :], mask=m_kv, other=0.0)
            if WIDE:
                b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
            # [BLOCK_R, BLOCK_N]
            if BLOCK_R == 1:  # noqa: SIM108
                b_s = tl.sum(b_q * b_k, 1)[None, :]
            else:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_s = b_s * scale
            if WEIGHTED:
                b_s += tl.load(p_weight + i_b * max_len + o_n, mask=m_n, other=0.0)[None, :]
            b_s = tl.where(m_n[None, :] & (o_n[None, :] < b_visible[:, None]), b_s, float("-inf"))
            b_m_next = tl.maximum(b_m, tl.max(b_s, 1))
            b_shift = tl.where(b_m_next == float("-inf"), 0.0, b_m_next)
            b_p = tl.exp(b_s - b_shift[:, None])
            b_decay = tl.exp(b_m - b_shift)
            b_l = b_l * b_decay + tl.sum(b_p, 1)
            if BLOCK_R == 1:
                b_pv = tl.sum(tl.trans(b_p) * b_v, 0)[None, :]
            else:
                b_pv = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
            b_acc = b_acc * b_decay[:, None] + b_pv
            b_m = b_m_next

        i_head = i_b * (tl.num_programs(1) // TILES) + i_kv
        o_slot = (i_head * tl.num_programs(0) + i_split) * ROWS + o_r
        tl.store(p_acc + o_slot[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_r[:, None] & m_d[None, :])
        tl.store(p_extremes + 2 * o_slot, b_m, mask=m_r)
        tl.store(p_extremes + 2 * o_slot + 1, b_l, mask=m_r)


@triton.jit
def decode_merge_kernel(
    p_acc,
    p_extremes,
    p_cache_len,
    p_out,
    p_lse,
    max_len,
    n,
    heads,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LSE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one row of out [batch, n, heads, HEAD_DIM] a program
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_query, i_head = i_row // heads // n, i_row // heads % n, i_row % heads
    length = tl.minimum(tl.load(p_cache_len + i_b), max_len)
    used = tl.maximum((length + SPLIT - 1) // SPLIT, 1)
    slot = ((i_b * (heads // GROUP) + i_head // GROUP) * splits) * (n * GROUP) + i_query * GROUP + i_head % GROUP
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    b_m = tl.full([], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, used, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < used
        o_slot = slot + o_s.to(tl.int64) * (n * GROUP)
        b_m_split = tl.load(p_extremes + 2 * o_slot, mask=m_s, other=float("-inf"))
        b_l_split = tl.load(p_extremes + 2 * o_slot + 1, mask=m_s, other=0.0)
        m_acc = m_s[:, None] & m_d[None, :]
        b_acc_split = tl.load(p_acc + o_slot[:, None] * HEAD_DIM + o_d[None, :], mask=m_acc, other=0.0)
        b_m_next = tl.maximum(b_m, tl.max(b_m_split, 0))
        b_shift = tl.where(b_m_next == float("-inf"), 0.0, b_m_next)
        b_share, b_decay = tl.exp(b_m_split - b_shift), tl.exp(b_m - b_shift)
        b_l = b_l * b_decay + tl.sum(b_share * b_l_split, 0)
        b_acc = b_acc * b_decay + tl.sum(b_share[:, None] * b_acc_split, 0)
        b_m = b_m_next
    b_out = tl.where(b_l == 0.0, 0.0, b_acc / tl.where(b_l == 0.0, 1.0, b_l))
    tl.store(p_out + i_row * HEAD_DIM + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)
    if LSE:
        tl.store(p_lse + i_row, tl.where(b_l == 0.0, float("-inf"), b_m + tl.log(tl.where(b_l == 0.0, 1.0, b_l))))


@triton.jit
def load_halves(p_x, o_x, m_x, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves [rows, BLOCK_H] float32 of the heads that start at o_x; of an odd head_dim, low has one more."""
    o_d = tl.arange(0, BLOCK_H)
    m_low, m_high = m_x[:, None] & (o_d < HALF)[None, :], m_x[:, None] & (o_d < HEAD_DIM - HALF)[None, :]
    p_low = p_x + o_x[:, None] + o_d[None, :]
    b_low = tl.load(p_low, mask=m_low, other=0.0).to(tl.float32)
    b_high = tl.load(p_low + HALF, mask=m_high, other=0.0).to(tl.float32)
    return b_low, b_high


@triton.jit
def store_halves(p_x, o_x, m_x, b_low, b_high, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    o_d = tl.arange(0, BLOCK_H)
    m_low, m_high = m_x[:, None] & (o_d < HALF)[None, :], m_x[:, None] & (o_d < HEAD_DIM - HALF)[None, :]
    p_low = p_x + o_x[:, None] + o_d[None, :]
    tl.store(p_low, b_low.to(p_x.dtype.element_ty), mask=m_low)
    tl.store(p_low + HALF, b_high.to(p_x.dtype.element_ty), mask=m_high)


@triton.jit
def normalise_halves(b_low, b_high, eps, KIND: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """x_hat and rstd [rows]; KIND 0 none, 1 layer, 2 root mean square."""
    o_d = tl.arange(0, b_low.shape[1])
    b_rstd = tl.full([b_low.shape[0]], 1.0, dtype=tl.float32)
    if KIND == 1:
        b_mean = (tl.sum(b_low, 1) + tl.sum(b_high, 1)) / HEAD_DIM
        b_low = tl.where((o_d < HALF)[None, :], b_low - b_mean[:, None], 0.0)
        b_high = tl.where((o_d < HEAD_DIM - HALF)[None, :], b_high - b_mean[:, None], 0.0)
    if KIND != 0:
        b_square = (tl.sum(b_low * b_low, 1) + tl.sum(b_high * b_high, 1)) / HEAD_DIM
        b_rstd = 1.0 / tl.sqrt(b_square + eps)
        b_low, b_high = b_low * b_rstd[:, None], b_high * b_rstd[:, None]
    return b_low, b_high, b_rstd


@triton.jit
def load_weight(
    p_q, p_k, m_q, WEIGHTS: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Both halves [rows, BLOCK_H] of q's weight where m_q, else of k's; WEIGHTS: 1 q, 2 k, 3 both."""
    o_d = tl.arange(0, BLOCK_H)
    m_low, m_high = o_d < HALF, o_d < HEAD_DIM - HALF
    b_q_low, b_q_high = tl.full([BLOCK_H], 1.0, dtype=tl.float32), tl.full([BLOCK_H], 1.0, dtype=tl.float32)
    b_k_low, b_k_high = b_q_low, b_q_high
    if WEIGHTS % 2 == 1:
        b_q_low = tl.load(p_q + o_d, mask=m_low, other=0.0)
        b_q_high = tl.load(p_q + HALF + o_d, mask=m_high, other=0.0)
    if WEIGHTS >= 2:
        b_k_low = tl.load(p_k + o_d, mask=m_low, other=0.0)
        b_k_high = tl.load(p_k + HALF + o_d, mask=m_high, other=0.0)
    b_low = tl.where(m_q[:, None], b_q_low[None, :], b_k_low[None, :])
    b_high = tl.where(m_q[:, None], b_q_high[None, :], b_k_high[None, :])
    return b_low, b_high


@triton.jit
def load_angles(p_cos, p_sin, b_position, m_x, table_rows, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin [rows, BLOCK_H]; a position outside the table is moved to its nearest row."""
    o_d = tl.arange(0, BLOCK_H)
    b_row = tl.minimum(tl.maximum(b_position, 0), table_rows - 1).to(tl.int64)
    o_t, m_t = b_row[:, None] * HALF + o_d[None, :], m_x[:, None] & (o_d < HALF)[None, :]
    return tl.load(p_cos + o_t, mask=m_t, other=1.0), tl.load(p_sin + o_t, mask=m_t, other=0.0)


@triton.jit
def kv_append_kernel(
    p_qkv,
    p_k,
    p_v,
    p_cache_len,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_q,
    stride_x_batch,
    stride_x_token,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    stride_v_batch,
    stride_v_head,
    stride_v_token,
    n,
    heads,
    kv_heads,
    max_len,
    table_rows,
    eps,
    KIND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROPE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # BLOCK heads of one token a program
    i_token = tl.program_id(0).to(tl.int64)
    i_b, i_n = i_token // n, i_token % n
    o_head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_head = o_head < heads + 2 * kv_heads
    m_q = o_head < heads
    m_k = (o_head >= heads) & (o_head < heads + kv_heads)
    m_v = (o_head >= heads + kv_heads) & m_head
    length = tl.load(p_cache_len + i_b)
    position = length - n + i_n
    # a vector, as the masks that it joins
    b_length = tl.zeros([BLOCK], dtype=tl.int32) + length
    fits = (b_length >= n) & (b_length <= max_len)
    o_x = i_b * stride_x_batch + i_n * stride_x_token + o_head * HEAD_DIM
    b_x_low, b_x_high = load_halves(p_qkv, o_x, m_head, HALF, HEAD_DIM, BLOCK_H)
    b_low, b_high, _ = normalise_halves(b_x_low, b_x_high, eps, KIND, HALF, HEAD_DIM)
    if WEIGHTS != 0:
        b_w_low, b_w_high = load_weight(p_q_weight, p_k_weight, m_q, WEIGHTS, HALF, HEAD_DIM, BLOCK_H)
        b_low, b_high = b_low * b_w_low, b_high * b_w_high
    if ROPE:
        b_position = tl.zeros([BLOCK], dtype=tl.int64) + position
        b_cos, b_sin = load_angles(p_cos, p_sin, b_position, m_head, table_rows, HALF, BLOCK_H)
        b_low, b_high = b_low * b_cos - b_high * b_sin, b_high * b_cos + b_low * b_sin
    store_halves(p_q, (i_token * heads + o_head) * HEAD_DIM, m_q, b_low, b_high, HALF, HEAD_DIM, BLOCK_H)
    o_kv = (o_head - heads).to(tl.int64)
    o_k = i_b * stride_k_batch + o_kv * stride_k_head + position * stride_k_token
    store_halves(p_k, o_k, m_k & fits, b_low, b_high, HALF, HEAD_DIM, BLOCK_H)
    o_v = i_b * stride_v_batch + (o_kv - kv_heads) * stride_v_head + position * stride_v_token
    store_halves(p_v, o_v, m_v & fits, b_x_low, b_x_high, HALF, HEAD_DIM, BLOCK_H)


@triton.jit
def qk_norm_kernel(
    p_x,
    p_positions,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_q,
    p_k,
    stride_x,
    total,
    heads,
    kv_heads,
    table_rows,
    eps,
    KIND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROPE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # BLOCK of the total * (heads + kv_heads) heads a program
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < total * (heads + kv_heads)
    o_token, o_head = o_row // (heads + kv_heads), o_row % (heads + kv_heads)
    m_q = o_head < heads
    o_x = o_token * stride_x + o_head * HEAD_DIM
    b_low, b_high = load_halves(p_x, o_x, m_row, HALF, HEAD_DIM, BLOCK_H)
    b_low, b_high, _ = normalise_halves(b_low, b_high, eps, KIND, HALF, HEAD_DIM)
    if WEIGHTS != 0:
        b_w_low, b_w_high = load_weight(p_q_weight, p_k_weight, m_q, WEIGHTS, HALF, HEAD_DIM, BLOCK_H)
        b_low, b_high = b_low * b_w_low, b_high * b_w_high
    if ROPE:
        b_position = tl.load(p_positions + o_token, mask=m_row, other=0)
        b_cos, b_sin = load_angles(p_cos, p_sin, b_position, m_row, table_rows, HALF, BLOCK_H)
        b_low, b_high = b_low * b_cos - b_high * b_sin, b_high * b_cos + b_low * b_sin
    o_q, o_k = (o_token * heads + o_head) * HEAD_DIM, (o_token * kv_heads + o_head - heads) * HEAD_DIM
    store_halves(p_q, o_q, m_row & m_q, b_low, b_high, HALF, HEAD_DIM, BLOCK_H)
    store_halves(p_k, o_k, m_row & (o_head >= heads), b_low, b_high, HALF, HEAD_DIM, BLOCK_H)


@triton.jit
def qk_norm_backward_kernel(
    p_grad,
    p_x,
    p_positions,
    p_weight,
    p_cos,
    p_sin,
    p_grad_x,
    p_partial,
    stride_x,
    total,
    heads,
    all_heads,
    head0,
    part,
    table_rows,
    eps,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROPE: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # `heads` heads (those of q, or of k) of CHUNK tokens a program; grad [total, heads, HEAD_DIM]
    i_chunk = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_H)
    b_w_low, b_w_high = tl.full([BLOCK_H], 1.0, dtype=tl.float32), tl.full([BLOCK_H], 1.0, dtype=tl.float32)
    if WEIGHTED:
        b_w_low = tl.load(p_weight + o_d, mask=o_d < HALF, other=0.0)
        b_w_high = tl.load(p_weight + HALF + o_d, mask=o_d < HEAD_DIM - HALF, other=0.0)
    b_sum_low = tl.zeros([BLOCK_H], dtype=tl.float32)
    b_sum_high = tl.zeros([BLOCK_H], dtype=tl.float32)
    for start in range(0, CHUNK * heads, BLOCK):
        o_row = start + tl.arange(0, BLOCK)
        o_token, o_head = i_chunk * CHUNK + o_row // heads, o_row % heads
        m_row = (o_row < CHUNK * heads) & (o_token < total)
        o_x = o_token * stride_x + (head0 + o_head) * HEAD_DIM
        b_low, b_high = load_halves(p_x, o_x, m_row, HALF, HEAD_DIM, BLOCK_H)
        b_low, b_high, b_rstd = normalise_halves(b_low, b_high, eps, KIND, HALF, HEAD_DIM)
        o_grad = (o_token * heads + o_head) * HEAD_DIM
        b_dy_low, b_dy_high = load_halves(p_grad, o_grad, m_row, HALF, HEAD_DIM, BLOCK_H)
        if ROPE:
            b_position = tl.load(p_positions + o_token, mask=m_row, other=0)
            b_cos, b_sin = load_angles(p_cos, p_sin, b_position, m_row, table_rows, HALF, BLOCK_H)
            b_dy_low, b_dy_high = b_dy_low * b_cos + b_dy_high * b_sin, b_dy_high * b_cos - b_dy_low * b_sin
        if WEIGHTED:
            b_sum_low += tl.sum(b_dy_low * b_low, 0)
            b_sum_high += tl.sum(b_dy_high * b_high, 0)
            b_dy_low, b_dy_high = b_dy_low * b_w_low[None, :], b_dy_high * b_w_high[None, :]
        if KIND != 0:
            b_along = (tl.sum(b_dy_low * b_low, 1) + tl.sum(b_dy_high * b_high, 1)) / HEAD_DIM
            b_mean = tl.zeros_like(b_along)
            if KIND == 1:
                b_mean = (tl.sum(b_dy_low, 1) + tl.sum(b_dy_high, 1)) / HEAD_DIM
            b_dy_low = b_rstd[:, None] * (b_dy_low - b_mean[:, None] - b_low * b_along[:, None])
            b_dy_high = b_rstd[:, None] * (b_dy_high - b_mean[:, None] - b_high * b_along[:, None])
        o_out = (o_token * all_heads + head0 + o_head) * HEAD_DIM
        store_halves(p_grad_x, o_out, m_row, b_dy_low, b_dy_high, HALF, HEAD_DIM, BLOCK_H)
    if PARTIAL:
        p_sum = p_partial + (2 * i_chunk + part) * HEAD_DIM + o_d
        tl.store(p_sum, b_sum_low, mask=o_d < HALF)
        tl.store(p_sum + HALF, b_sum_high, mask=o_d < HEAD_DIM - HALF)


def decode_attention_triton(q, k_cache, v_cache, cache_len, key_log_weight, scale, causal, out, lse):
    """Fills out [batch, n, heads, head_dim] and lse [batch, n, heads] (or None)."""
    batch, n, heads, head_dim = q.shape
    kv_heads, max_len = k_cache.shape[1:3]
    group, splits = heads // kv_heads, max(triton.cdiv(max_len, SPLIT), 1)
    rows = n * group
    block_rows = 1 if rows == 1 else BLOCK_ROWS
    tiles = triton.cdiv(rows, block_rows)
    sums = batch * kv_heads * splits * rows
    partial = torch.empty(sums * (head_dim + 2), dtype=torch.float32, device=q.device)
    acc, extremes = partial[: sums * head_dim], partial[sums * head_dim :]
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_keys = max(min(BLOCK_KEYS[block_rows > 1], BLOCK_BYTES // (block_d * q.element_size())), 16)
    with torch.cuda.device_of(q):
        decode_split_kernel[(splits, kv_heads * tiles, batch)](
            q,
            k_cache,
            v_cache,
            cache_len,
            key_log_weight,
            acc,
            extremes,
            *q.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            scale,
            max_len,
            N=n,
            GROUP=group,
            HEAD_DIM=head_dim,
            CAUSAL=causal,
            WEIGHTED=key_log_weight is not None,
            # the interpreter cannot multiply matrices of bfloat16
            WIDE=block_rows == 1 or library.interpreting(),
            SPLIT=SPLIT,
            BLOCK_R=block_rows,
            BLOCK_N=block_keys,
            BLOCK_D=block_d,
            num_warps=NUM_WARPS,
            num_stages=2,
        )
        decode_merge_kernel[(batch * n * heads,)](
            acc,
            extremes,
            cache_len,
            out,
            lse,
            max_len,
            n,
            heads,
            splits,
            GROUP=group,
            HEAD_DIM=head_dim,
            LSE=lse is not None,
            SPLIT=SPLIT,
            BLOCK_S=8,
            BLOCK_D=block_d,
            num_warps=NUM_WARPS,
        )


def norm_constants(norm, q_weight, k_weight, cos, head_dim):
    """What the norm kernels have in common: constants, and the heads of a program."""
    half = (head_dim + 1) // 2
    block_half = triton.next_power_of_2(half)
    weights = (q_weight is not None) + 2 * (k_weight is not None)
    constants = dict(KIND=norm, ROPE=cos is not None, HALF=half, HEAD_DIM=head_dim, BLOCK_H=block_half)
    return constants, dict(WEIGHTS=weights), min(max(BLOCK_ELEMENTS // (2 * block_half), 1), 32)


def kv_append_triton(qkv, k_cache, v_cache, cache_len, norm, eps, q_weight, k_weight, cos, sin, q):
    """Fills q [batch, n, heads, head_dim] and positions cache_len - n .. cache_len - 1 of the caches."""
    batch, n, heads, head_dim = q.shape
    kv_heads, max_len = k_cache.shape[1:3]
    constants, weights, block = norm_constants(norm, q_weight, k_weight, cos, head_dim)
    block = min(block, triton.next_power_of_2(heads + 2 * kv_heads))
    with torch.cuda.device_of(qkv):
        kv_append_kernel[(batch * n, triton.cdiv(heads + 2 * kv_heads, block))](
            qkv,
            k_cache,
            v_cache,
            cache_len,
            q_weight,
            k_weight,
            cos,
            sin,
            q,
            *qkv.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            n,
            heads,
            kv_heads,
            max_len,
            0 if cos is None else cos.shape[0],
            eps,
            BLOCK=block,
            **constants,
            **weights,
            num_warps=NUM_WARPS,
        )


def qk_norm_triton(qk, norm, eps, q_weight, k_weight, cos, sin, positions, q, k):
    """Fills q [total, heads, head_dim] and k [total, kv_heads, head_dim]."""
    total, heads, head_dim = q.shape
    constants, weights, block = norm_constants(norm, q_weight, k_weight, cos, head_dim)
    with torch.cuda.device_of(qk):
        qk_norm_kernel[(triton.cdiv(total * (heads + k.shape[1]), block),)](
            qk,
            positions,
            q_weight,
            k_weight,
            cos,
            sin,
            q,
            k,
            qk.stride(0),
            total,
            heads,
            k.shape[1],
            0 if cos is None else cos.shape[0],
            eps,
            BLOCK=block,
            **constants,
            **weights,
            num_warps=NUM_WARPS,
        )


def qk_norm_backward_triton(grad_q, grad_k, qk, norm, eps, q_weight, k_weight, cos, sin, positions, grad_qk, partial):
    """Fills grad_qk [total, (heads + kv_heads) * head_dim] and partial [chunks, 2, head_dim] (or None)."""
    total, heads, head_dim = grad_q.shape
    kv_heads = grad_k.shape[1]
    constants, _, block = norm_constants(norm, q_weight, k_weight, cos, head_dim)
    with torch.cuda.device_of(qk):
        for part, (grad, weight, head0) in enumerate(((grad_q, q_weight, 0), (grad_k, k_weight, heads))):
            qk_norm_backward_kernel[(triton.cdiv(total, CHUNK),)](
                grad,
                qk,
                positions,
                weight,
                cos,
                sin,
                grad_qk,
                partial,
                qk.stride(0),
                total,
                grad.shape[1],
                heads + kv_heads,
                head0,
                part,
                0 if cos is None else cos.shape[0],
                eps,
                WEIGHTED=weight is not None,
                PARTIAL=partial is not None,
                CHUNK=CHUNK,
                BLOCK=block,
                **constants,
                num_warps=NUM_WARPS,
            )

"""Attention over a key-value cache in Triton, float32 inside whatever comes in.

Each program takes one split of one kv head and sums it relative to its own maximum m with total l,
acc = sum exp(s_j - m) v_j; a second kernel merges:  out = sum exp(m_i - m) acc_i / sum exp(m_i - m) l_i
"""

import torch
import triton
import triton.language as tl

from .. import library

# keys of one split: as csrc/core/decode.h has them
SPLIT = 256
# keys of one step, at most, and the bytes they take: for one row, and for several (more spill); rows of tl.dot
BLOCK_KEYS = (64, 32)
BLOCK_BYTES = (16384, 8192)
BLOCK_ROWS = 16
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


def decode_attention_triton(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse):
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    if out.numel():
        q = q if q.stride(3) == 1 else q.contiguous()
        key_log_weight = None if key_log_weight is None else key_log_weight.contiguous()
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        given_lse = lse if return_lse else None
        launch(q, k_cache, v_cache, cache_len.contiguous(), key_log_weight, scale, causal, out, given_lse)
    return out, lse


def launch(q, k_cache, v_cache, cache_len, key_log_weight, scale, causal, out, lse):
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
    several = block_rows > 1
    block_keys = max(min(BLOCK_KEYS[several], BLOCK_BYTES[several] // (block_d * q.element_size())), 16)
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

"""Norms and rotary embedding of heads in Triton, float32 inside whatever comes in.

y = weight * (x - mean) * rstd, then (low, high) -> (low cos - high sin, high cos + low sin); a head is handled as its
two halves, the pairs of the rotary embedding.
"""

import torch
import triton
import triton.language as tl

# tokens of one partial sum of weight gradients: as csrc/core/head_norm.h has them
CHUNK = 32
# elements of a program that normalises
BLOCK_ELEMENTS = 2048
NUM_WARPS = 4


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


def kv_append__triton(qkv, k_cache, v_cache, cache_len, heads, norm, q_weight, k_weight, eps, cos, sin):
    q = qkv.new_empty((*qkv.shape[:2], heads, k_cache.shape[3]))
    if q.numel():
        tables = _floats(q_weight, k_weight, cos, sin)
        launch_append(_dense(qkv), k_cache, v_cache, cache_len.contiguous(), norm, eps, *tables, q)
    return q


def qk_norm_triton(qk, heads, kv_heads, norm, q_weight, k_weight, eps, cos, sin, positions):
    total, head_dim = qk.shape[0], qk.shape[1] // (heads + kv_heads)
    q, k = qk.new_empty((total, heads, head_dim)), qk.new_empty((total, kv_heads, head_dim))
    if total:
        tables = _floats(q_weight, k_weight, cos, sin)
        launch_norm(_dense(qk), norm, eps, *tables, _contiguous(positions), q, k)
    return q, k


def qk_norm_backward_triton(grad_q, grad_k, qk, norm, q_weight, k_weight, eps, cos, sin, positions):
    total, _, head_dim = grad_q.shape
    weighted = q_weight is not None or k_weight is not None
    grad_qk = qk.new_empty(qk.shape)
    # every program writes its chunk's sums
    partial = qk.new_empty((triton.cdiv(total, CHUNK) if weighted else 0, 2, head_dim), dtype=torch.float32)
    if total:
        grads, tables = (grad_q.contiguous(), grad_k.contiguous()), _floats(q_weight, k_weight, cos, sin)
        given = partial if weighted else None
        launch_norm_backward(*grads, _dense(qk), norm, eps, *tables, _contiguous(positions), grad_qk, given)
    return grad_qk, partial.sum(0) if weighted else partial[0:0, 0]


def _dense(x):
    """Rows of x contiguous, whatever lies between them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x):
    return None if x is None else x.contiguous()


def _floats(*tables):
    return [None if x is None else x.float().contiguous() for x in tables]


def norm_constants(norm, q_weight, k_weight, cos, head_dim):
    """What the norm kernels have in common: constants, and the heads of a program."""
    half = (head_dim + 1) // 2
    block_half = triton.next_power_of_2(half)
    weights = (q_weight is not None) + 2 * (k_weight is not None)
    constants = dict(KIND=norm, ROPE=cos is not None, HALF=half, HEAD_DIM=head_dim, BLOCK_H=block_half)
    return constants, dict(WEIGHTS=weights), min(max(BLOCK_ELEMENTS // (2 * block_half), 1), 32)


def launch_append(qkv, k_cache, v_cache, cache_len, norm, eps, q_weight, k_weight, cos, sin, q):
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


def launch_norm(qk, norm, eps, q_weight, k_weight, cos, sin, positions, q, k):
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


def launch_norm_backward(grad_q, grad_k, qk, norm, eps, q_weight, k_weight, cos, sin, positions, grad_qk, partial):
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

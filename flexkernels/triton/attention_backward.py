"""The gradient of attention in Triton, over the same plan as the forward.

    P = exp(S - lse),  D = rowsum(dO * out),  dS = P * (dO v^T - D)
    dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T dO

dq: a program per (tile of rows, head), as in the forward. dk and dv: a program per (tile of keys, kv head), which sums
over its query heads and rows itself, so nothing is atomic and every result is repeatable.
"""

import torch
import triton
import triton.language as tl

from ..layout import STEP
from .attention import (
    LENGTHS,
    LOG2_E,
    METADATA,
    add_weight,
    checked,
    choice,
    constants,
    dense,
    key_terms,
    load_block,
    load_runs,
    load_span,
    load_tile,
    options,
    query_terms,
    scale_of,
    sees,
    strides,
    weights,
)


@triton.jit
def dq_step(
    b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight, p_k_frame, p_k_rank,
    stride_k, stride_v, key, end, scale,
    MASKED: tl.constexpr, CROSS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    o_k = key + tl.arange(0, STEP)
    m_k = o_k < end
    b_k = load_block(p_k + tl.cast(key, tl.int64) * stride_k, o_kd, m_k, m_dim, MASKED, PADDED, DOT)
    b_v = load_block(p_v + tl.cast(key, tl.int64) * stride_v, o_vd, m_k, m_dim, MASKED, PADDED, DOT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_p = tl.exp2(add_weight(b_s, p_weight, o_k[None, :], m_k[None, :], MASKED) - b_lse[:, None])
    if MASKED:
        terms = key_terms(p_k_frame, p_k_rank, o_k[None, :], m_k[None, :], CROSS)
        b_p = tl.where(sees(query, terms, m_k[None, :], CROSS), b_p, 0.0)
    if p_norm is not None:
        b_sum += tl.sum(b_p, 1)
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(DOT)
    return tl.dot(b_ds, b_k, b_dq, input_precision="ieee"), b_sum


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=METADATA)
def attention_dq_kernel(
    p_do, p_q, p_k, p_v, p_out, p_lse, p_delta, p_norm, p_dq, p_weight, p_reach, p_q_frame, p_q_rank, p_k_frame,
    p_k_rank, p_rows, p_tiles, p_ptr, p_runs,
    stride_do, stride_doh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    total, heads, group, scale, scale_log2,
    CROSS: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # q, dO, out, dq [BLOCK, BLOCK_D], k and v [STEP, BLOCK_D]; D and 1 / sum P go to p_delta and p_norm
    # [heads, total] for dk
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    # later rows see more keys: they go first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = (program % heads).to(tl.int64)
    tile, rows, m_q, used = load_tile(p_tiles, p_rows, program // heads, ROWS, BLOCK)
    o_d, o_step, o_row = tl.arange(0, BLOCK_D), tl.arange(0, STEP).to(tl.int64), rows.to(tl.int64)
    m_dim = o_d < HEAD_DIM
    p_k += head // group * stride_kh
    p_v += head // group * stride_vh
    b_do = load_block(p_do + head * stride_doh, o_row[:, None] * stride_do + o_d, m_q, m_dim, False, PADDED, DOT)
    o_out = (o_row[:, None] * heads + head) * HEAD_DIM + o_d
    b_out = load_block(p_out, o_out, m_q, m_dim, False, PADDED, tl.float32)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out, 1)
    tl.store(p_delta + head * total + rows, b_delta, mask=m_q)
    # a row that sees nothing has -inf, and no key that is not masked
    b_lse = tl.load(p_lse + head * total + rows) * LOG2_E
    b_q = load_block(p_q + head * stride_qh, o_row[:, None] * stride_q + o_d, m_q, m_dim, False, PADDED, DOT)
    o_kd, o_vd = o_step[:, None] * stride_k + o_d, o_step[:, None] * stride_v + o_d
    b_dq = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    if CROSS is None:
        begin, middle, end = load_span(p_tiles, tile, used)
        middle = tl.minimum(begin + (middle - begin) // STEP * STEP, end)
        for key in range(begin, middle, STEP):
            b_dq, b_sum = dq_step(
                b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, None, p_k, p_v, o_kd, o_vd, m_dim, p_weight, None, None,
                stride_k, stride_v, key, end, scale_log2, False, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
        query = query_terms(p_reach, None, None, rows[:, None], m_q[:, None], CROSS)
        for key in range(middle, end, STEP):
            b_dq, b_sum = dq_step(
                b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight, None,
                None, stride_k, stride_v, key, end, scale_log2, True, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
    else:
        first, fulls, last = load_runs(p_tiles, p_ptr, tile, used)
        for i in range(first, first + fulls):
            begin, end = tl.load(p_runs + 3 * i), tl.load(p_runs + 3 * i + 1)
            for key in range(begin, end - STEP + 1, STEP):
                b_dq, b_sum = dq_step(
                    b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, None, p_k, p_v, o_kd, o_vd, m_dim, p_weight,
                    p_k_frame, p_k_rank, stride_k, stride_v, key, end, scale_log2, False, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
        query = query_terms(None, p_q_frame, p_q_rank, rows[:, None], m_q[:, None], CROSS)
        for i in range(first, last):
            begin, end = tl.load(p_runs + 3 * i), tl.load(p_runs + 3 * i + 1)
            # what is left of a full run after whole steps
            begin = tl.where(i < first + fulls, end - (end - begin) % STEP, begin)
            for key in range(begin, end, STEP):
                b_dq, b_sum = dq_step(
                    b_q, b_do, b_dq, b_sum, b_lse, b_delta, p_norm, query, p_k, p_v, o_kd, o_vd, m_dim, p_weight,
                    p_k_frame, p_k_rank, stride_k, stride_v, key, end, scale_log2, True, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
    if p_norm is not None:
        # lse is rounded: its P does not quite sum to 1
        b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
        tl.store(p_norm + head * total + rows, b_norm, mask=m_q)
        b_dq *= b_norm[:, None]
    tl.store(p_dq + o_out, (scale * b_dq).to(p_dq.dtype.element_ty), mask=m_q[:, None] & m_dim)


@triton.jit
def dkdv_step(
    b_k, b_v, b_dk, b_dv, b_weight, keys, m_key, p_do, p_q, p_lse, p_delta, p_norm, o_dod, o_qd, m_dim,
    p_reach, p_q_frame, p_q_rank, stride_do, stride_q, row, end, scale,
    MASKED: tl.constexpr, CROSS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Everything transposed: S^T, P^T and dS^T are [BLOCK, STEP]."""
    o_q = row + tl.arange(0, STEP)
    m_q = o_q < end
    b_q = load_block(p_q + tl.cast(row, tl.int64) * stride_q, o_qd, m_q, m_dim, MASKED, PADDED, DOT)
    b_do = load_block(p_do + tl.cast(row, tl.int64) * stride_do, o_dod, m_q, m_dim, MASKED, PADDED, DOT)
    if MASKED:
        b_lse, b_delta = tl.load(p_lse + o_q, mask=m_q, other=0.0), tl.load(p_delta + o_q, mask=m_q, other=0.0)
    else:
        b_lse, b_delta = tl.load(p_lse + o_q), tl.load(p_delta + o_q)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_s -= (b_lse * LOG2_E)[None, :]
    if b_weight is not None:
        b_s += b_weight[:, None]
    b_p = tl.exp2(b_s)
    if p_norm is not None:
        b_p *= tl.load(p_norm + o_q, mask=m_q, other=0.0)[None, :]
    if MASKED:
        query = query_terms(p_reach, p_q_frame, p_q_rank, o_q[None, :], m_q[None, :], CROSS)
        b_p = tl.where(sees(query, keys, m_key & m_q[None, :], CROSS), b_p, 0.0)
    b_dv = tl.dot(b_p.to(DOT), b_do, b_dv, input_precision="ieee")
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(DOT)
    return tl.dot(b_ds, b_q, b_dk, input_precision="ieee"), b_dv


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=METADATA)
def attention_dkdv_kernel(
    p_do, p_q, p_k, p_v, p_lse, p_delta, p_norm, p_dk, p_dv, p_weight, p_reach, p_q_frame, p_q_rank, p_k_frame,
    p_k_rank, p_tiles, p_ptr, p_runs,
    stride_do, stride_doh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    total, kv_heads, group, scale, scale_log2,
    CROSS: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # k, v, dk, dv [BLOCK, BLOCK_D], q and dO [STEP, BLOCK_D]; a tile has PARTS blocks of keys
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    index = tl.program_id(0) // kv_heads
    tile = index // PARTS
    o_k = tl.load(p_tiles + 8 * tile + 1) + index % PARTS * BLOCK + tl.arange(0, BLOCK)
    last_key = tl.load(p_tiles + 8 * tile + 2)
    used = tl.load(p_tiles + 8 * tile + 1) + index % PARTS * BLOCK < last_key
    o_d, o_step, o_row = tl.arange(0, BLOCK_D), tl.arange(0, STEP).to(tl.int64), o_k.to(tl.int64)
    m_dim, m_k = o_d < HEAD_DIM, o_k < last_key
    b_k = load_block(p_k + kv_head * stride_kh, o_row[:, None] * stride_k + o_d, m_k, m_dim, True, PADDED, DOT)
    b_v = load_block(p_v + kv_head * stride_vh, o_row[:, None] * stride_v + o_d, m_k, m_dim, True, PADDED, DOT)
    b_weight = None
    if p_weight is not None:
        b_weight = LOG2_E * tl.load(p_weight + o_k, mask=m_k, other=0.0)
    keys = key_terms(p_k_frame, p_k_rank, o_k[:, None], m_k[:, None], CROSS)
    o_dod, o_qd = o_step[:, None] * stride_do + o_d, o_step[:, None] * stride_q + o_d
    b_dk = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        p_head_do, p_head_q = p_do + head * stride_doh, p_q + head * stride_qh
        p_head_lse, p_head_delta, p_head_norm = p_lse + head * total, p_delta + head * total, None
        if p_norm is not None:
            p_head_norm = p_norm + head * total
        if CROSS is None:
            begin, middle, end = load_span(p_tiles, tile, used)
            # whole steps, counted from the end
            middle = tl.maximum(end - (end - middle) // STEP * STEP, begin)
            for row in range(middle, end, STEP):
                b_dk, b_dv = dkdv_step(
                    b_k, b_v, b_dk, b_dv, b_weight, None, None, p_head_do, p_head_q, p_head_lse, p_head_delta,
                    p_head_norm, o_dod, o_qd, m_dim, None, None, None, stride_do, stride_q, row, end, scale_log2,
                    False, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
            for row in range(begin, middle, STEP):
                b_dk, b_dv = dkdv_step(
                    b_k, b_v, b_dk, b_dv, b_weight, keys, m_k[:, None], p_head_do, p_head_q, p_head_lse, p_head_delta,
                    p_head_norm, o_dod, o_qd, m_dim, p_reach, None, None, stride_do, stride_q, row, middle, scale_log2,
                    True, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
        else:
            first, fulls, last = load_runs(p_tiles, p_ptr, tile, used)
            for i in range(first, first + fulls):
                begin, end = tl.load(p_runs + 3 * i), tl.load(p_runs + 3 * i + 1)
                for row in range(begin, end - STEP + 1, STEP):
                    b_dk, b_dv = dkdv_step(
                        b_k, b_v, b_dk, b_dv, b_weight, None, None, p_head_do, p_head_q, p_head_lse, p_head_delta,
                        p_head_norm, o_dod, o_qd, m_dim, None, None, None, stride_do, stride_q, row, end, scale_log2,
                        False, CROSS, PADDED, DOT, STEP,
                    )  # fmt: skip
            for i in range(first, last):
                begin, end = tl.load(p_runs + 3 * i), tl.load(p_runs + 3 * i + 1)
                begin = tl.where(i < first + fulls, end - (end - begin) % STEP, begin)
                for row in range(begin, end, STEP):
                    b_dk, b_dv = dkdv_step(
                        b_k, b_v, b_dk, b_dv, b_weight, keys, m_k[:, None], p_head_do, p_head_q, p_head_lse,
                        p_head_delta, p_head_norm, o_dod, o_qd, m_dim, None, p_q_frame, p_q_rank, stride_do, stride_q,
                        row, end, scale_log2, True, CROSS, PADDED, DOT, STEP,
                    )  # fmt: skip
    o_dk = (o_row[:, None] * kv_heads + kv_head) * HEAD_DIM + o_d
    tl.store(p_dk + o_dk, (scale * b_dk).to(p_dk.dtype.element_ty), mask=m_k[:, None] & m_dim)
    tl.store(p_dv + o_dk, b_dv.to(p_dv.dtype.element_ty), mask=m_k[:, None] & m_dim)


def attention_backward_triton(grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, softmax_scale):
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for grad, tokens in zip(grads, (layout[1], layout[4], layout[4]), strict=True):
        if len(grad) > len(tokens):
            grad[len(tokens) :] = 0
    kept = out.contiguous(), lse.contiguous(), checked(layout), weights(key_log_weight)
    launch(*dense(grad_out, q, k, v), *kept, mask, cross, softmax_scale, *grads)
    return grads


def launch(
    grad_out, q, k, v, out, lse, layout, key_log_weight, mask, cross, softmax_scale, dq, dk, dv, chosen=None
):  # fmt: skip
    """Fills the rows of dq, dk and dv that the layout holds, always in the same order.

    ``chosen`` (of dq, of dk and dv) replaces the tuning table's entries.
    """
    _, q_frame, q_rank, _, k_frame, k_rank, reach, rows, tiles, ptr, runs, *keys, _ = layout
    heads, kv_heads = q.shape[1], k.shape[1]
    of_dq, of_dkdv = chosen or (choice(name, q, rows, mask, cross) for name in ("attention_dq", "attention_dkdv"))
    group, scale = heads // kv_heads, scale_of(q, softmax_scale)
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if q.dtype == torch.float32 else None
    metadata, fixed = (key_log_weight, reach, q_frame, q_rank, k_frame, k_rank), constants(q, mask, cross)
    with torch.cuda.device_of(q):
        if len(tiles) and heads:
            attention_dq_kernel[(len(tiles) * (rows.shape[1] // of_dq["block"]) * heads,)](
                grad_out, q, k, v, out, lse, delta, norm, dq, *metadata, rows, tiles, ptr, runs,
                *strides(grad_out, q, k, v), len(q), heads, group, scale, scale * LOG2_E.value,
                ROWS=rows.shape[1], **fixed, **options(of_dq),
            )  # fmt: skip
        if len(keys[0]) and heads:
            parts = triton.cdiv(STEP, of_dkdv["block"])
            attention_dkdv_kernel[(len(keys[0]) * parts * kv_heads,)](
                grad_out, q, k, v, lse, delta, norm, dk, dv, *metadata, *keys,
                *strides(grad_out, q, k, v), len(q), kv_heads, group, scale, scale * LOG2_E.value,
                PARTS=parts, **fixed, **options(of_dkdv),
            )  # fmt: skip

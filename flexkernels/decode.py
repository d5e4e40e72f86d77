"""Decoding with a key-value cache: `decode_attention`, `kv_append_` and their references.

attention:  S = softmax_scale * q k^T + key_log_weight,  out = softmax(S) v,  lse = logsumexp(S)
append:     the norm and the rotary embedding of head_norm.py on q and k, then k and v into their caches
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from . import checks, library
from .head_norm import MAX_HEAD_DIM, NORMS, angles, check_merged, check_norm, code_of, norm_rotate, rows_of, widen
from .typed import as_typed

MAX_QUERIES = 16


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_len: torch.Tensor, *,
    softmax_scale: float | None = ..., key_log_weight: torch.Tensor | None = ..., causal: bool = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_len: torch.Tensor, *,
    softmax_scale: float | None = ..., key_log_weight: torch.Tensor | None = ..., causal: bool = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_len: torch.Tensor, *,
    softmax_scale: float | None = ..., key_log_weight: torch.Tensor | None = ..., causal: bool = ...,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    key_log_weight: torch.Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest tokens of each sequence over its cache; for inference, without a gradient.

    q: [batch, n, heads, head_dim] float32, bfloat16 or float16, n from 1 to 16, head_dim from 1 to 256.
    k_cache, v_cache: [batch, kv_heads, max_len, head_dim], heads a multiple of kv_heads; views with any strides but
    the last, which is 1 (a layer of a larger cache, a transposed projection of a text).
    cache_len: int32 [batch], the valid keys of each sequence, the n new ones included. Keys beyond are never read.
    softmax_scale: default 1 / sqrt(head_dim).
    key_log_weight: float32 [batch, max_len], added to every logit of that key; -inf hides the key.
    causal: query i sees the first cache_len - n + 1 + i keys; otherwise all cache_len.
    return_lse: also return the log-sum-exp of the logits.

    Returns out [batch, n, heads, head_dim] in q's dtype and, with `return_lse`, lse float32 [batch, n, heads]. A query
    that sees no key gets 0 and -inf; an empty batch gives empty results. Keys are summed in splits of a fixed length
    merged in a fixed order: a row's bits depend neither on the other rows nor on its place in the batch.

    Raises TypeError or ValueError for a wrong dtype, device, shape or stride. A cache_len outside 0 .. max_len raises
    ValueError on the CPU; elsewhere it is not looked for (that would wait for the device) and is cut to that range.
    """
    out, lse = _decode_attention_op(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse)
    return (out, lse) if return_lse else out


@as_typed(decode_attention)
def decode_attention_ref(
    q, k_cache, v_cache, cache_len, *, softmax_scale=None, key_log_weight=None, causal=True, return_lse=False
):
    """The specification of `decode_attention`: dense scores in float32 (float64 stays float64)."""
    scale, n, max_len = softmax_scale, q.shape[1], k_cache.shape[2]
    if scale is None:
        scale = q.shape[3] ** -0.5
    group = q.shape[2] // k_cache.shape[1]
    # [batch, heads, max_len, head_dim]
    k, v = (widen(x).repeat_interleave(group, 1) for x in (k_cache, v_cache))
    # [batch, n, 1]: keys that each query sees
    last = torch.arange(n, device=q.device) - n + 1 if causal else torch.zeros(n, device=q.device)
    visible = (cache_len.clamp(0, max_len)[:, None] + last)[..., None]
    position = torch.arange(max_len, device=q.device)
    # a cache beyond its length may hold anything, NaN too
    valid = (position < cache_len[:, None])[:, None, :, None]
    k, v = (torch.where(valid, x, 0) for x in (k, v))
    # [batch, heads, n, max_len]
    scores = scale * (widen(q).transpose(1, 2) @ k.transpose(-1, -2))
    if key_log_weight is not None:
        scores = scores + key_log_weight[:, None, None]
    scores = scores.masked_fill((position >= visible)[:, None], float("-inf"))
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    out = (torch.softmax(scores, -1).masked_fill(nothing, 0) @ v).transpose(1, 2).to(q.dtype)
    return (out, torch.logsumexp(scores, -1).transpose(1, 2)) if return_lse else out


def kv_append_(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    heads: int,
    norm: str | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Normalises and rotates q and k of a merged projection, and writes k and v into their caches (in place).

    qkv: [batch, n, (heads + 2 * kv_heads) * head_dim] float32, bfloat16 or float16: q, then k, then v of each token.
    k_cache, v_cache: [batch, kv_heads, max_len, head_dim] in qkv's dtype, strided as for `decode_attention`; positions
    cache_len - n .. cache_len - 1 are written, no others.
    cache_len: int32 [batch], the valid keys of each sequence once the n new ones are in.
    norm: None, "layer" or "rms", over head_dim, in float32; q_weight, k_weight: its factors [head_dim], or None for 1.
    rope: (cos, sin), float32 [at least max_len, head_dim / 2], row = position in the cache; see head_norm.py for pairs.

    Returns q [batch, n, heads, head_dim]. An empty batch or n = 0 writes nothing. For inference, without a gradient.

    Raises TypeError or ValueError for a wrong dtype, device, shape or stride. A cache_len below n or above max_len
    raises ValueError on the CPU; elsewhere it is not looked for, and nothing is written for that sequence (its q is
    rotated to the nearest position of the table).
    """
    cos, sin = angles(rope)
    return _kv_append_op(qkv, k_cache, v_cache, cache_len, heads, code_of(norm), q_weight, k_weight, eps, cos, sin)


@as_typed(kv_append_)
def kv_append_ref_(
    qkv, k_cache, v_cache, cache_len, *, heads, norm=None, q_weight=None, k_weight=None, eps=1e-5, rope=None
):
    """The specification of `kv_append_` in plain PyTorch; writes into the caches as well."""
    batch, n, _ = qkv.shape
    kv_heads, max_len, head_dim = k_cache.shape[1:]
    q, k, v = qkv.unflatten(2, (heads + 2 * kv_heads, head_dim)).split([heads, kv_heads, kv_heads], 2)
    position = (cache_len[:, None] - n + torch.arange(n, device=qkv.device)).long()
    tables = rows_of(*angles(rope), position)
    k = norm_rotate(k, norm, k_weight, eps, tables)
    fits = (cache_len >= n) & (cache_len <= max_len)
    row = torch.arange(batch, device=qkv.device)[fits, None]
    # the indexed dimensions come first: [rows, n, kv_heads, head_dim]
    k_cache[row, :, position[fits]] = k[fits]
    v_cache[row, :, position[fits]] = v[fits]
    return norm_rotate(q, norm, q_weight, eps, tables)


# validation


def _check_decode_attention(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse):
    checks.tensor("q", q, checks.FLOATS, 4)
    batch, n, heads, head_dim = q.shape
    check_caches(k_cache, v_cache, cache_len, "q", q, head_dim)
    if heads == 0 or heads % k_cache.shape[1]:
        checks.reject("q", f"have a multiple of k_cache's {k_cache.shape[1]} heads", f"{heads} heads")
    if not 1 <= n <= MAX_QUERIES:
        checks.reject("q", f"have 1 to {MAX_QUERIES} tokens a sequence", n)
    if key_log_weight is not None:
        checks.tensor("key_log_weight", key_log_weight, (torch.float32,), 2)
        checks.shape("key_log_weight", key_log_weight, (batch, k_cache.shape[2]))
        checks.same_device("key_log_weight", key_log_weight, "q", q)
    if softmax_scale is not None:
        checks.finite("softmax_scale", softmax_scale)
    checks.in_range("cache_len", cache_len, 0, k_cache.shape[2])


def _check_kv_append(qkv, k_cache, v_cache, cache_len, heads, norm, q_weight, k_weight, eps, cos, sin):
    checks.tensor("qkv", qkv, checks.FLOATS, 3)
    checks.tensor("k_cache", k_cache, checks.FLOATS, 4)
    head_dim = check_merged(qkv, 3, heads, k_cache.shape[1])
    check_caches(k_cache, v_cache, cache_len, "qkv", qkv, head_dim)
    check_norm(norm, q_weight, k_weight, eps, cos, sin, qkv, head_dim)
    if cos is not None and cos.shape[0] < k_cache.shape[2]:
        checks.reject("rope", f"have at least max_len = {k_cache.shape[2]} rows", cos.shape[0])
    checks.in_range("cache_len", cache_len, qkv.shape[1], k_cache.shape[2])


def check_caches(k_cache, v_cache, cache_len, name, x, head_dim):
    """The caches against the new tokens `x` [batch, ...]."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        checks.reject("head_dim", f"lie between 1 and {MAX_HEAD_DIM}", head_dim)
    for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(cache_name, cache, (x.dtype,), 4)
        checks.same_device(cache_name, cache, name, x)
        if cache.stride(3) != 1 and head_dim > 1:
            checks.reject(cache_name, "have stride 1 in its last dimension", cache.stride(3))
    batch, kv_heads, _, width = k_cache.shape
    if batch != x.shape[0] or kv_heads == 0 or width != head_dim:
        expected = f"have the shape [{x.shape[0]}, kv_heads, max_len, {head_dim}]"
        checks.reject("k_cache", expected, list(k_cache.shape))
    checks.shape("v_cache", v_cache, k_cache.shape, " of k_cache")
    checks.tensor("cache_len", cache_len, (torch.int32,), 1)
    checks.shape("cache_len", cache_len, (batch,))
    checks.same_device("cache_len", cache_len, name, x)


# references


def _decode_attention_reference(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse):
    out, lse = decode_attention_ref(
        q, k_cache, v_cache, cache_len,
        softmax_scale=softmax_scale, key_log_weight=key_log_weight, causal=causal, return_lse=True,
    )  # fmt: skip
    return out, lse if return_lse else lse.new_empty(0)


def _kv_append_reference(qkv, k_cache, v_cache, cache_len, heads, norm, q_weight, k_weight, eps, cos, sin):
    rope = None if cos is None else (cos, sin)
    return kv_append_ref_(
        qkv, k_cache, v_cache, cache_len,
        heads=heads, norm=NORMS[norm], q_weight=q_weight, k_weight=k_weight, eps=eps, rope=rope,
    )  # fmt: skip


# shapes


def _decode_attention_fake(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse):
    # an lse that is not asked for is an empty tensor: an op cannot return None
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


def _kv_append_fake(qkv, k_cache, v_cache, cache_len, heads, *_):
    return qkv.new_empty((*qkv.shape[:2], heads, k_cache.shape[3]))


# ops; on an H200 the CUDA kernel attends faster; Triton's appends in 1.3 us of a graph instead of 2.2, but takes 145 us
# of the host where it is called eagerly

_decode_attention_op = library.Op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_len, Tensor? key_log_weight, float? softmax_scale, "
    "bool causal, bool return_lse) -> (Tensor, Tensor)",
    check=_check_decode_attention,
    reference=_decode_attention_reference,
    fake=_decode_attention_fake,
    triton="decode",
)
_kv_append_op = library.Op(
    "kv_append_",
    "(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_len, int heads, int norm, Tensor? q_weight, "
    "Tensor? k_weight, float eps, Tensor? cos, Tensor? sin) -> Tensor",
    check=_check_kv_append,
    reference=_kv_append_reference,
    fake=_kv_append_fake,
    triton="head_norm",
    jvp=None,
)

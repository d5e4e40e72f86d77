"""Decoding with a key-value cache: `decode_attention`, `kv_append_`, `qk_norm` and their references.

    norm:       x_hat = (x - mean) / sqrt(var + eps) ("layer") or x / sqrt(mean(x**2) + eps) ("rms"), y = weight * x_hat
    rotary:     z[:half] = y[:half] cos - y[half:] sin,  z[half:] = y[half:] cos + y[:half] sin
    attention:  S = softmax_scale * q k^T + key_log_weight,  out = softmax(S) v,  lse = logsumexp(S)

The rotary embedding pairs channel i with channel i + head_dim / 2 (the half-split, "neox" convention).
"""

from __future__ import annotations

import torch

from . import checks, legacy

MAX_QUERIES = 16
MAX_HEAD_DIM = 256
# keys of one split, tokens of one partial sum of weight gradients: as csrc/core/decode.h has them
SPLIT = 256
CHUNK = 32
NORMS = (None, "layer", "rms")


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
    that sees no key gets 0 and -inf; an empty batch gives empty results. Keys are summed in splits of 256 merged in
    order: a row's bits depend neither on the other rows nor on its place in the batch.

    Raises TypeError or ValueError for a wrong dtype, device, shape or stride. A cache_len outside 0 .. max_len raises
    ValueError on the CPU; elsewhere it is not looked for (that would wait for the device) and is cut to that range.
    """
    _check_attention(q, k_cache, v_cache, cache_len, key_log_weight)
    scale = _scale(q, softmax_scale)
    out, lse = _attention_op(q, k_cache, v_cache, cache_len, key_log_weight, scale, causal, return_lse)
    return (out, lse) if return_lse else out


def decode_attention_ref(
    q, k_cache, v_cache, cache_len, *, softmax_scale=None, key_log_weight=None, causal=True, return_lse=False
):
    """The specification of `decode_attention`: dense scores in float32 (float64 stays float64)."""
    scale, n, max_len = _scale(q, softmax_scale), q.shape[1], k_cache.shape[2]
    group = q.shape[2] // k_cache.shape[1]
    # [batch, heads, max_len, head_dim]
    k, v = (_widen(x).repeat_interleave(group, 1) for x in (k_cache, v_cache))
    # [batch, n, 1]: keys that each query sees
    last = torch.arange(n, device=q.device) - n + 1 if causal else torch.zeros(n, device=q.device)
    visible = (cache_len.clamp(0, max_len)[:, None] + last)[..., None]
    position = torch.arange(max_len, device=q.device)
    # a cache beyond its length may hold anything, NaN too
    valid = (position < cache_len[:, None])[:, None, :, None]
    k, v = (torch.where(valid, x, 0) for x in (k, v))
    # [batch, heads, n, max_len]
    scores = scale * (_widen(q).transpose(1, 2) @ k.transpose(-1, -2))
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
    rope: (cos, sin), float32 [at least max_len, head_dim / 2], row = position in the cache; see the module for pairs.

    Returns q [batch, n, heads, head_dim]. An empty batch or n = 0 writes nothing. For inference, without a gradient.

    Raises TypeError or ValueError for a wrong dtype, device, shape or stride. A cache_len below n or above max_len
    raises ValueError on the CPU; elsewhere it is not looked for, and nothing is written for that sequence (its q is
    rotated to the nearest position of the table).
    """
    _check_append(qkv, k_cache, v_cache, cache_len, heads)
    cos, sin = _check_norm(norm, q_weight, k_weight, eps, rope, qkv, k_cache.shape[3])
    if cos is not None and cos.shape[0] < k_cache.shape[2]:
        checks.reject("rope", f"have at least max_len = {k_cache.shape[2]} rows", cos.shape[0])
    kind = NORMS.index(norm)
    return _append_op(qkv, k_cache, v_cache, cache_len, heads, kind, q_weight, k_weight, eps, cos, sin)


def kv_append_ref_(
    qkv, k_cache, v_cache, cache_len, *, heads, norm=None, q_weight=None, k_weight=None, eps=1e-5, rope=None
):
    """The specification of `kv_append_` in plain PyTorch; writes into the caches as well."""
    batch, n, _ = qkv.shape
    kv_heads, max_len, head_dim = k_cache.shape[1:]
    q, k, v = qkv.view(batch, n, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 2)
    position = (cache_len[:, None] - n + torch.arange(n, device=qkv.device)).long()
    tables = None if rope is None else [table[position.clamp(0, len(table) - 1)] for table in rope]
    k = _norm_rotate(k, norm, k_weight, eps, tables)
    fits = (cache_len >= n) & (cache_len <= max_len)
    row = torch.arange(batch, device=qkv.device)[fits, None]
    # the indexed dimensions come first: [rows, n, kv_heads, head_dim]
    k_cache[row, :, position[fits]] = k[fits]
    v_cache[row, :, position[fits]] = v[fits]
    return _norm_rotate(q, norm, q_weight, eps, tables)


def qk_norm(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int | None = None,
    *,
    norm: str | None = "layer",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of a merged projection, q and k normalised per head and rotated, in one pass; differentiable.

    qkv: [total, (heads + 2 * kv_heads) * head_dim] float32, bfloat16 or float16, head_dim from 1 to 256; the rows may
    be strided. kv_heads: default heads.
    norm, q_weight, k_weight, eps: as for `kv_append_`; the arithmetic is that of float32.
    rope, positions: (cos, sin), float32 [rows, head_dim / 2], and int32 [total], the table row of each token; both or
    neither. No gradient flows to the tables.

    Returns q [total, heads, head_dim], k [total, kv_heads, head_dim], and v, a view of qkv. An empty qkv gives empty
    results. Weight gradients are sums over fixed chunks of tokens, so they repeat bit for bit.

    Raises TypeError or ValueError for a wrong dtype, device, shape or number. A position outside the table raises
    ValueError on the CPU; elsewhere it is not looked for and is moved to the nearest row.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim = _check_merged(qkv, 2, heads, kv_heads)
    cos, sin = _check_norm(norm, q_weight, k_weight, eps, rope, qkv, head_dim)
    _check_positions(positions, cos, qkv)
    # a split's gradient is one concatenation, that of two slices would be two padded copies and a sum
    qk, v = qkv.split([(heads + kv_heads) * head_dim, kv_heads * head_dim], 1)
    q, k = _norm_op(qk, heads, kv_heads, NORMS.index(norm), q_weight, k_weight, eps, cos, sin, positions)
    return q, k, v.unflatten(1, (kv_heads, head_dim))


def qk_norm_ref(
    qkv,
    heads,
    kv_heads=None,
    *,
    norm="layer",
    q_weight=None,
    k_weight=None,
    eps=1e-5,
    rope=None,
    positions=None,
):
    """The specification of `qk_norm` in plain PyTorch, differentiable by itself (float64 stays float64)."""
    kv_heads = heads if kv_heads is None else kv_heads
    split = [heads, kv_heads, kv_heads]
    q, k, v = qkv.unflatten(1, (sum(split), qkv.shape[1] // sum(split))).split(split, 1)
    tables = None if rope is None else [table[positions.long().clamp(0, len(table) - 1)] for table in rope]
    return _norm_rotate(q, norm, q_weight, eps, tables), _norm_rotate(k, norm, k_weight, eps, tables), v


def _norm_rotate(x, norm, weight, eps, tables):
    # x [..., heads, head_dim], tables [..., head_dim / 2]
    y = _widen(x)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if tables is not None:
        cos, sin = (table.unsqueeze(-2) for table in tables)
        low, high = y.chunk(2, -1)
        y = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    return y.to(x.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(q, softmax_scale) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else checks.finite("softmax_scale", softmax_scale)


# validation


def _check_attention(q, k_cache, v_cache, cache_len, key_log_weight):
    checks.tensor("q", q, checks.FLOATS, 4)
    batch, n, heads, head_dim = q.shape
    _check_caches(k_cache, v_cache, cache_len, "q", q, head_dim)
    if heads == 0 or heads % k_cache.shape[1]:
        checks.reject("q", f"have a multiple of k_cache's {k_cache.shape[1]} heads", f"{heads} heads")
    if not 1 <= n <= MAX_QUERIES:
        checks.reject("q", f"have 1 to {MAX_QUERIES} tokens a sequence", n)
    if key_log_weight is not None:
        checks.tensor("key_log_weight", key_log_weight, (torch.float32,), 2)
        checks.shape("key_log_weight", key_log_weight, (batch, k_cache.shape[2]))
        checks.same_device("key_log_weight", key_log_weight, "q", q)


def _check_append(qkv, k_cache, v_cache, cache_len, heads):
    checks.tensor("qkv", qkv, checks.FLOATS, 3)
    checks.tensor("k_cache", k_cache, checks.FLOATS, 4)
    head_dim = _check_merged(qkv, 3, heads, k_cache.shape[1])
    _check_caches(k_cache, v_cache, cache_len, "qkv", qkv, head_dim)


def _check_caches(k_cache, v_cache, cache_len, name, x, head_dim):
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


def _check_merged(qkv, ndim, heads, kv_heads) -> int:
    """head_dim of a merged projection."""
    checks.tensor("qkv", qkv, checks.FLOATS, ndim)
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if isinstance(count, bool) or not isinstance(count, int):
            checks.reject(name, "be an int", type(count).__name__, TypeError)
        if count < 1:
            checks.reject(name, "be at least 1", count)
    head_dim, rest = divmod(qkv.shape[-1], heads + 2 * kv_heads)
    if rest or not 1 <= head_dim <= MAX_HEAD_DIM:
        must = f"have (heads + 2 * kv_heads) * head_dim columns, {heads + 2 * kv_heads} times 1 to {MAX_HEAD_DIM}"
        checks.reject("qkv", must, qkv.shape[-1])
    return head_dim


def _check_norm(norm, q_weight, k_weight, eps, rope, x, head_dim):
    """cos and sin, or None twice."""
    if norm not in NORMS:
        checks.reject("norm", "be None, 'layer' or 'rms'", repr(norm))
    if checks.finite("eps", eps) < 0:
        checks.reject("eps", "be at least 0", eps)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        if norm is None:
            checks.reject(name, "be None without a norm", "a tensor")
        checks.tensor(name, weight, checks.FLOATS, 1)
        checks.shape(name, weight, (head_dim,))
        checks.same_device(name, weight, "qkv", x)
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        checks.reject("rope", "be a pair (cos, sin)", type(rope).__name__, TypeError)
    if head_dim % 2:
        checks.reject("head_dim", "be even for a rotary embedding", head_dim)
    for name, table in (("cos", rope[0]), ("sin", rope[1])):
        checks.tensor(name, table, (torch.float32,), 2)
        checks.shape(name, table, (rope[0].shape[0], head_dim // 2))
        checks.same_device(name, table, "qkv", x)
    return rope


def _check_positions(positions, cos, qkv):
    if (positions is None) != (cos is None):
        checks.reject("rope and positions", "be given together", "one of them")
    if positions is None:
        return
    checks.tensor("positions", positions, (torch.int32,), 1)
    checks.shape("positions", positions, qkv.shape[:1])
    checks.same_device("positions", positions, "qkv", qkv)
    if cos.shape[0] == 0:
        checks.reject("rope", "have at least 1 row", 0)


def _check_range(name: str, values: torch.Tensor, low: int, high: int):
    """Looks at the values: for CPU tensors alone, inside an op."""
    if values.device.type != "cpu":
        return
    # a list is the quickest way for the few numbers of a decoding step
    numbers = values.tolist() if values.numel() <= 64 else [int(end) for end in torch.aminmax(values)]
    for number in numbers:
        if not low <= number <= high:
            checks.reject(name, f"lie between {low} and {high}", number)


# ops


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with stride 1 in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def _wide(*tensors):
    return [None if x is None else x.float().contiguous() for x in tensors]


def _attention_impl(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse):
    _check_range("cache_len", cache_len, 0, k_cache.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel():
        cache_len, key_log_weight = _contiguous(cache_len, key_log_weight)
        legacy.launch(
            "decode_attention", _rows(q), k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, out, lse
        )
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _attention_fake(q, k_cache, v_cache, cache_len, key_log_weight, softmax_scale, causal, return_lse):
    lse_shape = q.shape[:3] if return_lse else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse_shape, dtype=torch.float32)


def _append_impl(qkv, k_cache, v_cache, cache_len, heads, norm, q_weight, k_weight, eps, cos, sin):
    _check_range("cache_len", cache_len, qkv.shape[1], k_cache.shape[2])
    q = _append_fake(qkv, k_cache, v_cache, cache_len, heads)
    if q.numel():
        (cache_len,), tables = _contiguous(cache_len), _wide(q_weight, k_weight, cos, sin)
        legacy.launch("kv_append", _rows(qkv), k_cache, v_cache, cache_len, norm, eps, *tables, q)
    return q


def _append_fake(qkv, k_cache, v_cache, cache_len, heads, *_):
    return qkv.new_empty((*qkv.shape[:2], heads, k_cache.shape[3]))


def _norm_impl(qk, heads, kv_heads, norm, q_weight, k_weight, eps, cos, sin, positions):
    if positions is not None:
        _check_range("positions", positions, 0, cos.shape[0] - 1)
    q, k = _norm_fake(qk, heads, kv_heads)
    if q.numel():
        tables = _wide(q_weight, k_weight, cos, sin)
        legacy.launch("qk_norm", _rows(qk), norm, eps, *tables, *_contiguous(positions), q, k)
    return q, k


def _norm_fake(qk, heads, kv_heads, *_):
    head_dim = qk.shape[1] // (heads + kv_heads)
    return qk.new_empty((qk.shape[0], heads, head_dim)), qk.new_empty((qk.shape[0], kv_heads, head_dim))


def _norm_setup(ctx, inputs, output):
    qk, _, _, ctx.norm, q_weight, k_weight, ctx.eps, *tables = inputs
    ctx.save_for_backward(qk, q_weight, k_weight, *tables)


def _norm_backward(ctx, grad_q, grad_k):
    qk, q_weight, k_weight, *tables = ctx.saved_tensors
    grad_qk, grad_weight = _norm_backward_op(grad_q, grad_k, qk, ctx.norm, q_weight, k_weight, ctx.eps, *tables)
    grads = [None if w is None else grad_weight[i].to(w.dtype) for i, w in enumerate((q_weight, k_weight))]
    return grad_qk, None, None, None, *grads, None, None, None, None


def _norm_backward_impl(grad_q, grad_k, qk, norm, q_weight, k_weight, eps, cos, sin, positions):
    grad_qk, grad_weight = _norm_backward_fake(grad_q, grad_k, qk, norm, q_weight, k_weight)
    if grad_qk.numel() == 0:
        return grad_qk, grad_weight.zero_()
    partial = None
    if q_weight is not None or k_weight is not None:
        partial = grad_weight.new_empty(-(-qk.shape[0] // CHUNK), *grad_weight.shape)
    tables = _wide(q_weight, k_weight, cos, sin)
    grads = _contiguous(grad_q, grad_k)
    legacy.launch("qk_norm_backward", *grads, _rows(qk), norm, eps, *tables, *_contiguous(positions), grad_qk, partial)
    return grad_qk, grad_weight if partial is None else torch.sum(partial, 0, out=grad_weight)


def _norm_backward_fake(grad_q, grad_k, qk, norm, q_weight, k_weight, *_):
    # without weights their gradient is empty: an op cannot return None
    rows = 0 if q_weight is None and k_weight is None else 2
    return qk.new_empty(qk.shape), qk.new_empty((rows, grad_q.shape[2]), dtype=torch.float32)


_attention_op = legacy.define(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_len, Tensor? key_log_weight, float softmax_scale, "
    "bool causal, bool return_lse) -> (Tensor, Tensor)",
    _attention_impl,
    _attention_fake,
)
_append_op = legacy.define(
    "kv_append_",
    "(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_len, int heads, int norm, Tensor? q_weight, "
    "Tensor? k_weight, float eps, Tensor? cos, Tensor? sin) -> Tensor",
    _append_impl,
    _append_fake,
)
_norm_op = legacy.define(
    "qk_norm",
    "(Tensor qk, int heads, int kv_heads, int norm, Tensor? q_weight, Tensor? k_weight, float eps, Tensor? cos, "
    "Tensor? sin, Tensor? positions) -> (Tensor, Tensor)",
    _norm_impl,
    _norm_fake,
)
_norm_backward_op = legacy.define(
    "qk_norm_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor qk, int norm, Tensor? q_weight, Tensor? k_weight, float eps, Tensor? cos, "
    "Tensor? sin, Tensor? positions) -> (Tensor, Tensor)",
    _norm_backward_impl,
    _norm_backward_fake,
)
legacy.define_autograd("qk_norm", _norm_backward, _norm_setup)


# backends: each fills preallocated outputs


def decode_attention_reference(q, k_cache, v_cache, cache_len, key_log_weight, scale, causal, out, lse):
    o, s = decode_attention_ref(
        q, k_cache, v_cache, cache_len,
        softmax_scale=scale, key_log_weight=key_log_weight, causal=causal, return_lse=True,
    )  # fmt: skip
    out.copy_(o)
    if lse is not None:
        lse.copy_(s)


def decode_attention_native(q, k_cache, *args):
    torch.ops.flexkernels_native.decode_attention(q, k_cache, *args)


def decode_attention_triton(*args):
    from .triton import decode

    decode.decode_attention_triton(*args)


def kv_append_reference(qkv, k_cache, v_cache, cache_len, norm, eps, q_weight, k_weight, cos, sin, q):
    rope = None if cos is None else (cos, sin)
    weights = dict(q_weight=q_weight, k_weight=k_weight)
    q.copy_(
        kv_append_ref_(
            qkv, k_cache, v_cache, cache_len, heads=q.shape[2], norm=NORMS[norm], eps=eps, rope=rope, **weights
        )
    )


def kv_append_native(*args):
    torch.ops.flexkernels_native.kv_append_(*args)


def kv_append_triton(*args):
    from .triton import decode

    decode.kv_append_triton(*args)


def qk_norm_reference(qk, norm, eps, q_weight, k_weight, cos, sin, positions, q, k):
    tables = None if cos is None else [table[positions.long().clamp(0, len(table) - 1)] for table in (cos, sin)]
    parts = qk.unflatten(1, (q.shape[1] + k.shape[1], -1)).split([q.shape[1], k.shape[1]], 1)
    for part, weight, out in zip(parts, (q_weight, k_weight), (q, k), strict=True):
        out.copy_(_norm_rotate(part, NORMS[norm], weight, eps, tables))


def qk_norm_native(*args):
    torch.ops.flexkernels_native.qk_norm(*args)


def qk_norm_triton(*args):
    from .triton import decode

    decode.qk_norm_triton(*args)


def qk_norm_backward_reference(
    grad_q, grad_k, qk, norm, eps, q_weight, k_weight, cos, sin, positions, grad_qk, partial
):
    # [total, heads + kv_heads, head_dim]
    dy = torch.cat([grad_q, grad_k], 1).float()
    if cos is not None:
        c, s = (table[positions.long().clamp(0, len(table) - 1)][:, None] for table in (cos, sin))
        low, high = dy.chunk(2, -1)
        dy = torch.cat([low * c + high * s, high * c - low * s], -1)
    x_hat = qk.unflatten(1, dy.shape[1:]).float()
    if NORMS[norm] == "layer":
        x_hat = x_hat - x_hat.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps) if norm else torch.ones_like(x_hat)
    x_hat = x_hat * rstd
    heads = (grad_q.shape[1], grad_k.shape[1])
    if partial is not None:
        partial.zero_()
        partial[0].copy_(torch.stack([part.sum((0, 1)) for part in (dy * x_hat).split(heads, 1)]))
    ones = dy.new_ones(dy.shape[2])
    weights = (ones if weight is None else weight for weight in (q_weight, k_weight))
    dx = torch.cat([part * weight for part, weight in zip(dy.split(heads, 1), weights, strict=True)], 1)
    if norm:
        dx = dx - x_hat * (dx * x_hat).mean(-1, keepdim=True) - (dx.mean(-1, keepdim=True) if norm == 1 else 0)
    grad_qk.copy_((dx * rstd).flatten(1))


def qk_norm_backward_native(*args):
    torch.ops.flexkernels_native.qk_norm_backward(*args)


def qk_norm_backward_triton(*args):
    from .triton import decode

    decode.qk_norm_backward_triton(*args)


legacy.register("decode_attention", "reference", decode_attention_reference)
legacy.register("decode_attention", "cpu", decode_attention_native)
legacy.register("decode_attention", "triton", decode_attention_triton)
legacy.register("decode_attention", "cuda", decode_attention_native)
legacy.register("kv_append", "reference", kv_append_reference)
legacy.register("kv_append", "cpu", kv_append_native)
legacy.register("kv_append", "triton", kv_append_triton)
legacy.register("kv_append", "cuda", kv_append_native)
legacy.register("qk_norm", "reference", qk_norm_reference)
legacy.register("qk_norm", "cpu", qk_norm_native)
legacy.register("qk_norm", "triton", qk_norm_triton)
legacy.register("qk_norm", "cuda", qk_norm_native)
legacy.register("qk_norm_backward", "reference", qk_norm_backward_reference)
legacy.register("qk_norm_backward", "cpu", qk_norm_backward_native)
legacy.register("qk_norm_backward", "triton", qk_norm_backward_triton)
legacy.register("qk_norm_backward", "cuda", qk_norm_backward_native)

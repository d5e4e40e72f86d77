"""Decoding as stock PyTorch does it: SDPA on a view of the cache, the norm as a formula."""

import torch
import torch.nn.functional as F


def cached_sdpa(q, k_cache, v_cache, length):
    """q [batch, 1, heads, head_dim] over the first `length` (an int) keys of [batch, kv_heads, max_len, head_dim].

    Source: torch.nn.functional.scaled_dot_product_attention with enable_gqa, PyTorch documentation.
    """
    k, v = k_cache[:, :, :length], v_cache[:, :, :length]
    gqa = q.shape[2] != k.shape[1]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=gqa).transpose(1, 2)


def qk_layer_norm(qkv, heads):
    """qkv [total, 3 * heads * head_dim] -> q, k, v [total, heads, head_dim]; layer norm in float32.

    Source: query-key norm of arXiv 2302.05442, equation 1, by torch.nn.functional.layer_norm.
    """
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    q, k = (F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype) for x in (q, k))
    return q, k, v


def append_rms(qkv, k_cache, v_cache, position, heads, cos, sin):
    """qkv [batch, 1, 3 * heads * head_dim]; writes position (an int), returns q [batch, 1, heads, head_dim].

    Source: torch.nn.functional.rms_norm, then `rotate`, then an assignment into a cache allocated beforehand.
    """
    q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    q, k = (rotate(F.rms_norm(x, x.shape[-1:], eps=1e-5), cos[position], sin[position]) for x in (q, k))
    k_cache[:, :, position] = k[:, 0]
    v_cache[:, :, position] = v[:, 0]
    return q


def rotate(x, cos, sin):
    """Source: arXiv 2104.09864, equation 34, with the two halves of a head as the pairs."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

"""Plain PyTorch versions of ops with the signatures of their kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x, weight, *, eps=1e-6, residual=None):
    total = x if residual is None else x + residual
    wide = total.float()
    out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
    return out if residual is None else (total, out)


def swiglu(x):
    gate, value = x.float().chunk(2, -1)
    return (F.silu(gate) * value).to(x.dtype)


def skinny_linear(x, weight, bias=None, *, residual=None, activation=None, weight_scale=None):
    if len(x) > 16:
        raise ValueError(f"x must have at most 16 rows, got {len(x)}")
    if weight_scale is None:
        out = F.linear(x, weight, bias)
    else:
        out = (F.linear(x.float(), weight.float()) * weight_scale).to(x.dtype)
        out = out if bias is None else out + bias
    if activation == "swiglu":
        out = swiglu(out)
    return out if residual is None else residual + out


def decode_attention(
    q, k_cache, v_cache, cache_len, *, softmax_scale=None, key_log_weight=None, causal=True, return_lse=False
):
    n, max_len = q.shape[1], k_cache.shape[2]
    last = cache_len[:, None] - n + 1 + torch.arange(n, device=q.device) if causal else cache_len[:, None].expand(-1, n)
    mask = torch.arange(max_len, device=q.device) < last[:, None, :, None]
    # the unwritten end of a cache may hold NaN, which a mask alone does not stop
    written = (torch.arange(max_len, device=q.device) < cache_len[:, None])[:, None, :, None]
    k, v = k_cache.masked_fill(~written, 0), v_cache.masked_fill(~written, 0)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2)


def kv_append_(
    qkv, k_cache, v_cache, cache_len, *, heads, norm=None, q_weight=None, k_weight=None, eps=1e-5, rope=None
):
    batch, n, _ = qkv.shape
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    position = (cache_len[:, None] - n + torch.arange(n, device=qkv.device)).long()
    row = torch.arange(batch, device=qkv.device)[:, None]
    k_cache[row, :, position] = k.unflatten(-1, (kv_heads, head_dim))
    v_cache[row, :, position] = v.unflatten(-1, (kv_heads, head_dim))
    return q.unflatten(-1, (heads, head_dim))


def sample_logits(
    logits, *, uncond_logits=None, guidance=1.0, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, offset=0,
    return_logprob=False,
):  # fmt: skip
    logits = logits.float()
    if uncond_logits is not None:
        logits = uncond_logits.float() + guidance * (logits - uncond_logits.float())
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = (ordered.cumsum(-1) - ordered >= top_p).scatter(1, order, ordered.cumsum(-1) - ordered >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), float("-inf"))
    seeds = torch.as_tensor(seed).expand(len(logits)).tolist()
    offsets = torch.as_tensor(offset).expand(len(logits)).tolist()
    noise = [
        torch.rand(logits.shape[-1], generator=torch.Generator().manual_seed(hash((s, o)) % 2**62))
        for s, o in zip(seeds, offsets, strict=True)
    ]
    gumbel = -(-torch.stack(noise).clamp_min(1e-20).log()).log()
    return (logits + gumbel.to(logits.device)).argmax(-1)

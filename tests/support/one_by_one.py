"""Attention over packed sequences, one after the other: what variable-length kernels are compared with."""

import torch


def one_by_one(q, k, v, cu_q, cu_k, causal, scale):
    """out like q and lse ``[total_q, heads]`` by softmax, sequence by sequence, in the given dtype."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=q.dtype, device=q.device)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        scores = scale * torch.einsum("qhd,khd->hqk", q[rows], k[keys])
        n, m = scores.shape[1:]
        if causal:
            # aligned at the bottom right, as flash-attn does since 2.1
            scores = scores.masked_fill(torch.ones(n, m, device=q.device).triu(m - n + 1).bool(), -torch.inf)
        lse[rows] = scores.logsumexp(-1).T
        out[rows] = torch.einsum("hqk,khd->qhd", torch.nan_to_num(scores.softmax(-1)), v[keys])
    return out, lse

"""Attention over one packed sequence as stock PyTorch does it."""

import torch.nn.functional as F


def dense_mask(q, k, v, mask):
    """q, k, v [total, heads, head_dim], mask bool [total, total]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

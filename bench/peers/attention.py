"""Attention over packed sequences as stock PyTorch does it; q, k, v [total, heads, head_dim] throughout."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def as_batch(*tensors):
    """Source: the layout that SDPA documents, [batch, heads, tokens, head_dim]."""
    return [x.transpose(0, 1)[None] for x in tensors]


def dense_mask(q, k, v, mask):
    """mask [total, total], bool or added to the scores.

    Source: torch.nn.functional.scaled_dot_product_attention with attn_mask, PyTorch documentation.
    """
    return F.scaled_dot_product_attention(*as_batch(q, k, v), attn_mask=mask)[0].transpose(0, 1)


def cudnn(q, k, v, mask=None, causal=False):
    """Source: SDPA as above, its cuDNN backend forced by torch.nn.attention.sdpa_kernel."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*as_batch(q, k, v), attn_mask=mask, is_causal=causal)[0].transpose(0, 1)


def flash(q, k, v, causal=False):
    """Source: SDPA as above, its flash backend forced; it takes no mask."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*as_batch(q, k, v), is_causal=causal)[0].transpose(0, 1)


def fa3(causal=False):
    """FlashAttention-3 where its forward-only wheel can be imported (Hopper, bfloat16), else None.

    Source: the package fa3-fwd, flash_attn_func.
    """
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return None

    def call(q, k, v):
        out = flash_attn_func(q[None], k[None], v[None], causal=causal)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return call


class Blocks:
    """SDPA over the rows of one frame part at a time and the keys up to where they see: no mask but for registers that
    are causal among themselves.

    Source: SDPA as above; the cut into parts follows from the mask.
    """

    def __init__(self, sequences, causal_registers, mask):
        self.parts, at = [], 0
        for frames in sequences:
            start = at
            for patches, registers in frames:
                end = at + patches + registers
                if causal_registers:
                    self.parts.append((slice(at, at + patches), slice(start, at + patches), None))
                    rows = slice(at + patches, end)
                    self.parts.append((rows, slice(start, end), mask[rows, start:end].contiguous()))
                else:
                    self.parts.append((slice(at, end), slice(start, end), None))
                at = end

    def __call__(self, q, k, v, weight=None):
        out = torch.empty_like(q)
        for rows, keys, mask in self.parts:
            bias = mask if weight is None else weight[keys].to(q.dtype).expand(rows.stop - rows.start, -1)
            out[rows] = dense_mask(q[rows], k[keys], v[keys], bias)
        return out


class Flex:
    """Compiled FlexAttention with a block mask, made beforehand and not counted.

    Source: torch.nn.attention.flex_attention, PyTorch documentation; arXiv 2604.12887 uses it.
    """

    def __init__(self, layout, weight, device):
        sequence, frame, rank = layout.sequence, layout.frame, layout.rank
        prefix, plain = layout.mask == "frame_causal_prefix", layout.mask in ("full", "causal")
        causal = layout.mask == "causal"

        def visible(_b, _h, q, k):
            if plain:
                return (sequence[q] == sequence[k]) & ((k <= q) if causal else (k >= 0))
            own = (frame[k] == frame[q]) & (rank[k] <= rank[q]) if prefix else frame[k] == frame[q]
            return (sequence[q] == sequence[k]) & ((frame[k] < frame[q]) | own)

        total = layout.total
        self.block_mask = create_block_mask(visible, None, None, total, total, device=device)
        self.score = None if weight is None else lambda score, _b, _h, _q, k: score + weight[k]
        self.attention = torch.compile(flex_attention)

    def __call__(self, q, k, v):
        out = self.attention(*as_batch(q, k, v), score_mod=self.score, block_mask=self.block_mask)
        return out[0].transpose(0, 1)

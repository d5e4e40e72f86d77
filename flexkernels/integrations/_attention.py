"""Attention over padded batches, as general libraries hold them, by packing."""

from __future__ import annotations

import torch

from .. import checks
from ..attention import attention
from ..layout import SequenceLayout


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    padding: torch.Tensor | None,
    softmax_scale: float | None,
) -> torch.Tensor:
    """Full or causal attention.

    q: ``[batch, length, heads, head_dim]``; k, v: ``[batch, key_length, kv_heads, head_dim]``. causal: the queries
    stand at the last keys, and see what is not after them. padding: bool ``[batch, key_length]``, True for keys that
    exist; its values are read by the host. With causal it holds for the queries too.

    Returns ``[batch, length, heads, head_dim]``, zeros in rows of queries that do not exist.
    """
    batch, length = q.shape[:2]
    mask = "causal" if causal else "full"
    if padding is None:
        layout = _layout([length] * batch, [k.shape[1]] * batch, mask, q.device)
        out = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, softmax_scale=softmax_scale)
        return out.unflatten(0, (batch, length))
    # causal queries are the last of the keys
    exists = padding[:, k.shape[1] - length :] if causal else torch.ones_like(q[..., 0, 0], dtype=torch.bool)
    layout = _layout(exists.sum(1).tolist(), padding.sum(1).tolist(), mask, q.device)
    packed = attention(q[exists], k[padding], v[padding], layout, softmax_scale=softmax_scale)
    return torch.zeros_like(q).masked_scatter(exists[..., None, None], packed)


def key_padding(name: str, mask: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The bool mask ``[batch, key_length]`` or ``[batch, 1, 1, key_length]`` of the keys k, as the former."""
    batch, length = k.shape[:2]
    if mask.dtype != torch.bool or mask.shape not in ((batch, length), (batch, 1, 1, length)):
        must = f"be a bool mask of keys, [{batch}, {length}] or [{batch}, 1, 1, {length}], as no other is supported"
        checks.reject(name, must, f"{checks.short(mask.dtype)} {list(mask.shape)}")
    return mask.view(batch, length)


def _layout(lengths: list[int], key_lengths: list[int], mask: str, device: torch.device) -> SequenceLayout:
    frames, key_frames = ([[(length, 0)] for length in each] for each in (lengths, key_lengths))
    return SequenceLayout.cached(frames, mask, device=device, key_frames=None if frames == key_frames else key_frames)

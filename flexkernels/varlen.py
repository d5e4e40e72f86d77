"""flash-attn's variable-length interface on :func:`flexkernels.attention`."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import checks
from .attention import attention
from .layout import SequenceLayout

# cu_seqlens_q -> (what it was made from, layout); an entry goes when its tensor does
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


@overload
def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ...,
    block_table: torch.Tensor | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ..., deterministic: bool = ..., *, return_attn_probs: Literal[True],
    block_table: torch.Tensor | None = ...,
) -> tuple[torch.Tensor, torch.Tensor, None]: ...  # fmt: skip
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Full or causal attention over packed sequences, called as flash-attn's function of this name.

    Args:
        q: ``[total_q, heads, head_dim]``; k, v: ``[total_k, kv_heads, head_dim]``, as in :func:`flexkernels.attention`.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``, rising from 0. Their values are read by the host once per
            tensor (on CUDA that waits for the device) and the layout is kept while the tensor lives, so pass the same
            tensors again: then nothing waits, and the call can be captured by a CUDA graph. Tensors made in inference
            mode are read in every call.
        max_seqlen_q, max_seqlen_k: accepted, not needed.
        causal: query i of a sequence sees key j where ``j <= i + key_length - query_length``.
        return_attn_probs: also return lse, float32 ``[heads, total_q]``, and None.
        deterministic: accepted; the backward always is.

    Returns:
        out ``[total_q, heads, head_dim]``; rows beyond ``cu_seqlens_q[-1]`` and rows that see nothing are 0.

    Raises:
        ValueError: dropout, a window, softcap, alibi_slopes or block_table is asked for, or cu_seqlens fall, do not
            start at 0 or exceed the rows of q and k. Further errors as :func:`flexkernels.attention`.
    """
    fixed = (
        ("dropout_p", dropout_p, 0.0),
        ("window_size", tuple(window_size), (-1, -1)),
        ("softcap", softcap, 0.0),
        ("alibi_slopes", alibi_slopes, None),
        ("block_table", block_table, None),
    )
    for name, value, default in fixed:
        if value is not default and (default is None or value != default):
            checks.reject(name, f"be {default}, as nothing else is supported", value)
    layout = _layout(cu_seqlens_q, cu_seqlens_k, "causal" if causal else "full")
    out, lse = attention(q, k, v, layout, softmax_scale=softmax_scale, return_lse=True)
    return (out, lse.T, None) if return_attn_probs else out


def _layout(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, mask: str) -> SequenceLayout:
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.tensor(name, value, checks.INTEGERS, 1)
    checks.like("cu_seqlens_k", cu_seqlens_k, "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_q.is_inference() or cu_seqlens_k.is_inference():
        # have no version that would tell of a change
        return _made(cu_seqlens_q, cu_seqlens_k, mask)
    made_from = (cu_seqlens_q._version, id(cu_seqlens_k), cu_seqlens_k._version, mask)
    kept = _layouts.get(cu_seqlens_q)
    if kept is None or kept[0] != made_from:
        layout = _made(cu_seqlens_q, cu_seqlens_k, mask)
        # holding cu_seqlens_k keeps its id from being given to another tensor
        kept = _layouts[cu_seqlens_q] = (made_from, layout, cu_seqlens_k if cu_seqlens_k is not cu_seqlens_q else None)
    return kept[1]


def _made(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, mask: str) -> SequenceLayout:
    lengths = [_lengths(*named) for named in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))]
    return SequenceLayout.from_lengths(lengths[0], mask, cu_seqlens_q.device, lengths[1])


def _lengths(name: str, cu_seqlens: torch.Tensor) -> list[int]:
    if len(cu_seqlens) == 0:
        checks.reject(name, "have at least one entry", "none")
    values = cu_seqlens.cpu()
    checks.offsets(name, values, int(values[-1]))
    return values.diff().tolist()

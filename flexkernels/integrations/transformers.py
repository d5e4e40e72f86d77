"""transformers: an entry "flexkernels" of its AttentionInterface and AttentionMaskInterface.

    from flexkernels.integrations import transformers
    transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flexkernels")

Served: causal and full attention, grouped heads, padding on any side, key-value caches that grow, packed sequences
given by cu_seq_lens_q and cu_seq_lens_k. What is not served raises ValueError.

`Draw` is a logits processor whose token is that of `sample_logits`:

    model.generate(inputs, do_sample=False, logits_processor=[transformers.Draw(temperature=0.8, top_p=0.9, seed=1)])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from ..sampling import sample_logits
from ..varlen import flash_attn_varlen_func
from ._attention import dense_attention, key_padding

NAME = "flexkernels"
# arguments of some models that change the attention, and the values that do not
UNSUPPORTED = {"softcap": None, "s_aux": None, "position_bias": None, "sliding_window": None}


def register() -> None:
    """Adds the entry; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer.

    query ``[batch, heads, length, head_dim]``; key, value ``[batch, kv_heads, key_length, head_dim]``;
    attention_mask: None or the padding, bool ``[batch, key_length]``. With cu_seq_lens_q and cu_seq_lens_k
    (int ``[sequences + 1]``) batch is 1 and they alone say what sees what.

    Returns ``[batch, length, heads, head_dim]``, zeros at padding, and None for the attention weights.
    Raises ValueError for dropout, another mask, or an argument of UNSUPPORTED.
    """
    if dropout:
        checks.reject("dropout", f"be 0 with attn_implementation {NAME!r}", dropout)
    for name, nothing in UNSUPPORTED.items():
        if kwargs.get(name) is not nothing:
            checks.reject(name, f"be {nothing} with attn_implementation {NAME!r}", "another value")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    cu_seqlens_q, cu_seqlens_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if len(q) != 1:
            checks.reject("query", "have batch 1 beside cu_seq_lens_q", f"batch {len(q)}")
        out = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k, softmax_scale=scaling, causal=causal)
        return out.unsqueeze(0), None
    padding = None if attention_mask is None else key_padding("attention_mask", attention_mask, k)
    return dense_attention(q, k, v, causal, padding, scaling), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What transformers hands to each layer: the padding ``[batch, kv_length]``, or None when there is none.

    Any mask but causal and full becomes transformers' own dense one, ``[batch, 1, q_length, kv_length]``, which
    :func:`attention_forward` refuses unless cu_seq_lens_q stands beside it. Raises ValueError where the queries are
    not the last of the keys, as in static caches.
    """
    from transformers import masking_utils

    causal = mask_function is masking_utils.causal_mask_function
    if not causal and mask_function is not masking_utils.bidirectional_mask_function:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
    if causal and int(q_offset) + q_length != kv_offset + kv_length:
        got = f"queries up to {int(q_offset) + q_length} and keys up to {kv_offset + kv_length}"
        checks.reject("the key-value cache", "end with the queries (a static cache does not)", got)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if padding.all() else padding


class Draw:
    """Logits processor that leaves one token, the one that :func:`flexkernels.sample_logits` draws.

    settings: temperature, top_k, top_p, min_p, seed (int or int64 ``[batch]``), as there. The position in the sequence
    is the offset, so a token depends on the seed, its row, its position and the logits alone: not on torch's generator,
    the device or the batch size. Give it last, with ``do_sample=False``.

    Raises TypeError for another setting; what sample_logits raises, at the first token.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | torch.Tensor = 0,
    ) -> None:
        self.settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids int64 ``[batch, length]``, scores ``[batch, vocab]``; returns 0 at the token and -inf elsewhere."""
        ids = sample_logits(scores, offset=input_ids.shape[1], **self.settings)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids[:, None], 0.0)

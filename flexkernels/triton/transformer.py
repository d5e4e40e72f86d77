"""A decoding step through a stack of blocks: its parts, launched one by one, which a CUDA graph makes cheap."""

from ..transformer_parts import Parts
from .decode import decode_attention_triton
from .head_norm import kv_append__triton
from .linear import skinny_linear_triton
from .norm import rms_norm_triton


def _append(qkv, k_cache, v_cache, cache_len, heads):
    # norm 0: none
    return kv_append__triton(qkv, k_cache, v_cache, cache_len, heads, 0, None, None, 0.0, None, None)


PARTS = Parts(
    norm=lambda x, weight, eps: rms_norm_triton(x, weight, None, eps)[1],
    linear=lambda x, weight, scale, residual, swiglu: skinny_linear_triton(x, weight, scale, None, residual, swiglu),
    append=_append,
    attend=lambda q, k, v, cache_len, causal: decode_attention_triton(q, k, v, cache_len, None, None, causal, False)[0],
)


def transformer_step__triton(x, *arguments):
    if x.numel():
        PARTS.step(x, *arguments)

"""A decoding step through a stack of blocks: its parts, launched one by one, which a CUDA graph makes cheap."""

from ..decode import decode_attention, kv_append_
from ..transformer_parts import Parts
from .linear import skinny_linear_triton
from .norm import rms_norm_triton

PARTS = Parts(
    norm=lambda x, weight, eps: rms_norm_triton(x, weight, None, eps)[1],
    linear=lambda x, weight, scale, residual, swiglu: skinny_linear_triton(x, weight, scale, None, residual, swiglu),
    append=lambda qkv, k, v, cache_len, heads: kv_append_(qkv, k, v, cache_len, heads=heads),
    attend=lambda q, k, v, cache_len, causal: decode_attention(q, k, v, cache_len, causal=causal),
)


def transformer_step__triton(x, *arguments):
    if x.numel():
        PARTS.step(x, *arguments)

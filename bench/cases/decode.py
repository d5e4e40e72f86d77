"""Decoding steps of a generator, and the query-key norm of the tokenizer."""

import torch
from peers import decode as decode_peers

import flexkernels

from .case import Case, accurate, case, compiled, size


def decode_attention(device: str, dtype: torch.dtype, batch: int, kv_heads: int, length: int) -> Case:
    """One new token over caches of one length, 16 query heads of 64."""
    heads, head_dim, max_len = 16, 64, max(length, 1280)
    q = torch.randn(batch, 1, heads, head_dim).to(dtype).to(device)
    # a layer of a cache for two
    k, v = torch.randn(2, 2, batch, kv_heads, max_len, head_dim).to(dtype).to(device)[:, 1]
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)

    def ours():
        return flexkernels.decode_attention(q, k, v, lengths)

    def check():
        exact = flexkernels.decode_attention_ref(q.double(), k.double(), v.double(), lengths)
        return accurate(ours(), flexkernels.decode_attention_ref(q, k, v, lengths), exact)

    peers = {"SDPA on cache views": lambda: decode_peers.cached_sdpa(q, k, v, length)}
    moved = size(k[:, :, :length], v[:, :, :length], q, q)
    flops = 4 * batch * heads * length * head_dim
    return Case(dtype, [batch, heads, kv_heads, length, head_dim], ours, peers, check, moved, flops, bandwidth="read")


ATTENTION = {
    "g1": (2, 16, 1),
    "g256": (2, 16, 256),
    "g1280": (2, 16, 1280),
    "gqa": (2, 2, 1280),
    "large": (16, 16, 4096),
}
for shape, (batch, kv_heads, length) in ATTENTION.items():
    for dtype, suffix in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        arguments = (dtype, batch, kv_heads, length)
        case(f"decode_attention_{shape}_{suffix}")(lambda device, a=arguments: decode_attention(device, *a))


def qk_norm(device: str, dtype: torch.dtype) -> Case:
    heads, head_dim = 28, 64
    qkv = torch.randn(2560, 3 * heads * head_dim).to(dtype).to(device)

    def ours():
        return flexkernels.qk_norm(qkv, heads)

    def check():
        results = zip(
            ours(), decode_peers.qk_layer_norm(qkv, heads), flexkernels.qk_norm_ref(qkv.double(), heads), strict=True
        )
        return next((wrong for parts in results if (wrong := accurate(*parts))), None)

    peers = {"eager formula": lambda: decode_peers.qk_layer_norm(qkv, heads)}
    peers |= {name: lambda f=f: f(qkv, heads) for name, f in compiled(decode_peers.qk_layer_norm, device).items()}
    moved = 4 * size(qkv) // 3
    return Case(dtype, list(qkv.shape), ours, peers, check, moved, note="layer norm of q and k, 28 heads")


@case("qk_norm_fp32")
def qk_norm_fp32(device: str) -> Case:
    return qk_norm(device, torch.float32)


@case("qk_norm_bf16")
def qk_norm_bf16(device: str) -> Case:
    return qk_norm(device, torch.bfloat16)


@case("kv_append_fp32")
def kv_append(device: str) -> Case:
    batch, heads, head_dim, max_len, position = 2, 16, 64, 1280, 700
    qkv = torch.randn(batch, 1, 3 * heads * head_dim, device=device)
    k, v = torch.zeros(2, batch, heads, max_len, head_dim, device=device)
    angle = torch.arange(max_len, device=device)[:, None] / 10000 ** torch.linspace(0, 1, head_dim // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    lengths = torch.full((batch,), position + 1, dtype=torch.int32, device=device)

    def ours():
        return flexkernels.kv_append_(qkv, k, v, lengths, heads=heads, norm="rms", rope=(cos, sin))

    def check():
        # the caches as float64, so that one comparison covers q, k and v
        arguments = dict(heads=heads, norm="rms", rope=(cos, sin))
        exact_k, exact_v = k.double().zero_(), v.double().zero_()
        exact = flexkernels.kv_append_ref_(qkv.double(), exact_k, exact_v, lengths, **arguments)
        plain_k, plain_v = torch.zeros_like(k), torch.zeros_like(v)
        plain = decode_peers.append_rms(qkv, plain_k, plain_v, position, heads, cos, sin)
        results = ((ours(), plain, exact), (k, plain_k, exact_k), (v, plain_v, exact_v))
        return next((wrong for parts in results if (wrong := accurate(*parts))), None)

    spare = torch.zeros_like(k), torch.zeros_like(v)
    peers = {"eager formula": lambda: decode_peers.append_rms(qkv, *spare, position, heads, cos, sin)}
    note = "root mean square norm, rotary embedding, append"
    return Case(qkv.dtype, list(qkv.shape), ours, peers, check, 2 * size(qkv), note=note)

"""Attention of the tokenizer's layouts."""

import torch
from peers import attention as attention_peers

import flexkernels

from .case import Case, accurate, case, size


def attention_encoder(device: str, dtype: torch.dtype) -> Case:
    heads, head_dim = 8, 64
    layout = flexkernels.SequenceLayout([[(256, 256)] * 5], "frame_causal_prefix", device=device)
    q, k, v = torch.randn(3, layout.total, heads, head_dim).to(dtype).to(device)
    mask = layout.visible()

    def ours():
        return flexkernels.attention(q, k, v, layout)

    def check():
        exact = flexkernels.attention_ref(q.double(), k.double(), v.double(), layout)
        return accurate(ours(), flexkernels.attention_ref(q, k, v, layout), exact)

    peers = {"dense-mask SDPA": lambda: attention_peers.dense_mask(q, k, v, mask)}
    flops = 4 * head_dim * heads * int(mask.sum())
    note = "5 frames of 256 patches and 256 registers; flops count seen pairs"
    return Case(dtype, list(q.shape), ours, peers, check, size(q, k, v, q), flops, note)


@case("attention_encoder_fp32")
def attention_encoder_fp32(device: str) -> Case:
    return attention_encoder(device, torch.float32)


@case("attention_encoder_bf16")
def attention_encoder_bf16(device: str) -> Case:
    return attention_encoder(device, torch.bfloat16)

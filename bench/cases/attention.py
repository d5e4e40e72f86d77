"""Attention of the tokenizer's layouts: encoder, decoder, decoder with collapsed registers, and a ragged batch."""

from functools import partial

import torch
from peers import attention as attention_peers

import flexkernels

from .case import Case, accurate, case, size

HEAD_DIM = 64
RAGGED = [
    [(256, 256)] * 5, [(256, 128)] * 3, [(144, 256)] * 4, [(256, 256)], [(64, 64)] * 5, [(256, 33)] * 5,
    [(196, 17)] * 2, [(256, 256)] * 2,
]  # fmt: skip
# name: sequences, mask, heads, whether keys are weighted
LAYOUTS = {
    "encoder": ([[(256, 256)] * 5], "frame_causal_prefix", 18, False),
    "decoder": ([[(256, 256)] * 5], "frame_causal", 28, False),
    "collapsed": ([[(256, 33)] * 5], "frame_causal", 28, True),
    "ragged": (RAGGED, "frame_causal_prefix", 18, False),
}


def problem(name: str, device: str, dtype: torch.dtype):
    frames, mask, heads, weighted = LAYOUTS[name]
    # the last register of a frame stands for 224
    merged = (flexkernels.SequenceLayout(frames, mask).rank == 32).nonzero()[:, 0].tolist() if weighted else None
    layout = flexkernels.SequenceLayout(frames, mask, device=device, weighted_keys=merged)
    q, k, v = torch.randn(3, layout.total, heads, HEAD_DIM).to(dtype).to(device)
    weight = None
    if weighted:
        weight = torch.where(layout.rank == 32, torch.tensor(224.0).log().to(device), 0.0)
    return layout, q, k, v, weight


def reference(name: str, q, k, v, weight):
    """attention_ref one sequence at a time: all at once, its dense scores would take tens of gigabytes."""
    frames, mask, _, _ = LAYOUTS[name]
    pieces, at = [], 0
    for sequence in frames:
        layout = flexkernels.SequenceLayout([sequence], mask, device=q.device)
        rows = slice(at, at + layout.total)
        key_weight = None if weight is None else weight[rows]
        pieces.append(flexkernels.attention_ref(q[rows], k[rows], v[rows], layout, key_log_weight=key_weight))
        at = rows.stop
    return torch.cat(pieces)


def attention_forward(name: str, dtype: torch.dtype, device: str) -> Case:
    layout, q, k, v, weight = problem(name, device, dtype)
    visible = layout.visible()
    bias = visible if weight is None else weight.expand_as(visible).masked_fill(~visible, -torch.inf).to(dtype)
    blocks = attention_peers.Blocks(LAYOUTS[name][0], layout.mask == "frame_causal_prefix", visible)
    flex = attention_peers.Flex(layout, weight, device)

    def ours():
        return flexkernels.attention(q, k, v, layout, key_log_weight=weight)

    def check():
        exact = reference(name, q.double(), k.double(), v.double(), weight)
        return accurate(ours(), reference(name, q, k, v, weight), exact)

    peers = {
        "dense-mask SDPA": lambda: attention_peers.dense_mask(q, k, v, bias),
        "SDPA by blocks": lambda: blocks(q, k, v, weight),
        "compiled FlexAttention": lambda: flex(q, k, v),
    }
    if device == "cuda" and dtype != torch.float32:
        peers["cuDNN, dense mask"] = lambda: attention_peers.cudnn(q, k, v, bias)
    flops = 4 * HEAD_DIM * q.shape[1] * int(visible.sum())
    return Case(dtype, list(q.shape), ours, peers, check, size(q, k, v, q), flops, "flops count seen pairs")


def attention_long(mask: str, length: int, heads: int, head_dim: int, device: str) -> Case:
    """One long sequence, where the best attention kernels of all show what they can; bfloat16."""
    layout = flexkernels.SequenceLayout.from_lengths([length], mask, device)
    q, k, v = torch.randn(3, length, heads, head_dim, device=device).bfloat16()
    causal = mask == "causal"

    def ours():
        return flexkernels.attention(q, k, v, layout)

    def check():
        # the rows of the first, a middle and the last query tile against float64
        rows = torch.cat([torch.arange(at, at + 64) for at in (0, length // 2 - 32, length - 64)]).to(device)
        wide = [x.double().transpose(0, 1) for x in (q[rows], k, v)]
        seen = torch.arange(length, device=device)[None, :] <= rows[:, None] if causal else None
        exact = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=seen).transpose(0, 1)
        plain = attention_peers.dense_mask(q[rows], k, v, seen)
        return accurate(ours()[rows], plain, exact)

    flex = attention_peers.Flex(layout, None, device)
    peers = {
        "flash SDPA": lambda: attention_peers.flash(q, k, v, causal),
        "cuDNN SDPA": lambda: attention_peers.cudnn(q, k, v, causal=causal),
        "compiled FlexAttention": lambda: flex(q, k, v),
    }
    third = attention_peers.fa3(causal)
    if third:
        peers["FA3"] = lambda: third(q, k, v)
    pairs = length * (length + 1) // 2 if causal else length**2
    note = f"{mask}, one sequence; flops count seen pairs"
    return Case(q.dtype, list(q.shape), ours, peers, check, size(q, k, v, q), 4 * head_dim * heads * pairs, note)


def attention_backward(name: str, dtype: torch.dtype, device: str) -> Case:
    layout, q, k, v, weight = problem(name, device, dtype)
    visible = layout.visible()
    grad = torch.randn_like(q)

    def gradients(function, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        with torch.enable_grad():
            out = function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad.to(out.dtype), retain_graph=True)

    run = gradients(lambda *x: flexkernels.attention(*x, layout, key_log_weight=weight), q, k, v)
    dense = gradients(lambda *x: attention_peers.dense_mask(*x, visible), q, k, v)

    def check():
        formula = partial(flexkernels.attention_ref, layout=layout, key_log_weight=weight)
        exact = gradients(formula, q.double(), k.double(), v.double())()
        found = (accurate(*x) for x in zip(run(), gradients(formula, q, k, v)(), exact, strict=True))
        return next((wrong for wrong in found if wrong), None)

    flops = 10 * HEAD_DIM * q.shape[1] * int(visible.sum())
    note = "backward alone; flops count seen pairs"
    return Case(dtype, list(q.shape), run, {"dense-mask SDPA": dense}, check, size(q, k, v, q, q, k, v), flops, note)


for layout_name in LAYOUTS:
    for short, data_type in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        case(f"attention_{layout_name}_{short}")(partial(attention_forward, layout_name, data_type))
for layout_name, short, data_type in (
    ("encoder", "fp32", torch.float32), ("encoder", "bf16", torch.bfloat16), ("decoder", "fp32", torch.float32),
):  # fmt: skip
    case(f"attention_{layout_name}_backward_{short}")(partial(attention_backward, layout_name, data_type))
for mask_name, head_dim_ in (("full", 64), ("causal", 64), ("full", 128)):
    long = partial(attention_long, mask_name, 16_384, 1024 // head_dim_, head_dim_)
    case(f"attention_{mask_name}16k_d{head_dim_}_bf16", gpu_only=True)(long)

"""A call of every public op as models make them, on any device: what a CUDA graph has to hold.

flash_attn_varlen_func, which reads cu_seqlens, and quantize_rows, which looks at the weights, wait for the device.
"""

import torch

import flexkernels
from flexkernels import APG, CFG
from vft.codebook import codebook_cross_entropy

LEVELS = (8, 5, 5)
HEADS, DIM, WIDTH = 2, 64, 128
NORMS = ("adaln_norm", "gated_residual", "gated_residual_adaln_norm", "rms_norm", "swiglu")


def rows(device, *shape):
    return torch.randn(shape).to(device)


def norms(name):
    def make(device):
        x, y, table = rows(device, 6, WIDTH), rows(device, 6, WIDTH), rows(device, 2, WIDTH)
        segment = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32).to(device)
        given = {
            "adaln_norm": (x, table, table, segment),
            "gated_residual": (x, y, table, segment),
            "gated_residual_adaln_norm": (x, y, table, table, table, segment),
            "rms_norm": (x, table[0]),
            "swiglu": (x,),
        }[name]
        return lambda: with_gradients(getattr(flexkernels, name), given)

    return make


def with_gradients(function, given):
    """Results and the gradients of all floating inputs."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in given]
    with torch.enable_grad():
        out = function(*leaves)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None and o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return (*outs, *torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs]))


def attention(device):
    layout = flexkernels.SequenceLayout([[(4, 3)] * 2, [(5, 1)]], "frame_causal_prefix", device=device)
    q, k, v = rows(device, 3, layout.total, HEADS, DIM)
    weight = rows(device, layout.total)
    return lambda: with_gradients(lambda *x: flexkernels.attention(*x, layout, key_log_weight=weight), (q, k, v))


def decode(device):
    q, caches = rows(device, 2, 1, HEADS, DIM), rows(device, 2, 2, HEADS, 16, DIM)
    lengths = torch.tensor([3, 16], dtype=torch.int32).to(device)
    return lambda: flexkernels.decode_attention(q, *caches, lengths)


def kv_append(device):
    qkv, caches = rows(device, 2, 1, 3 * HEADS * DIM), rows(device, 2, 2, HEADS, 16, DIM)
    lengths, tables = torch.tensor([3, 16], dtype=torch.int32).to(device), rows(device, 2, 16, DIM // 2)
    return lambda: flexkernels.kv_append_(qkv, *caches, lengths, heads=HEADS, norm="rms", rope=tuple(tables))


def qk_norm(device):
    qkv = rows(device, 5, 3 * HEADS * DIM)
    return lambda: with_gradients(lambda x: flexkernels.qk_norm(x, HEADS), (qkv,))


def transformer_step(device):
    vector = torch.ones(WIDTH).to(device)
    linears = {
        "qkv": rows(device, 3 * WIDTH, WIDTH), "proj": rows(device, WIDTH, WIDTH),
        "w13": rows(device, 8, WIDTH), "w2": rows(device, WIDTH, 4),
    }  # fmt: skip
    weights = flexkernels.StackWeights([flexkernels.BlockWeights(norm_attn=vector, norm_mlp=vector, **linears)])
    x, caches = rows(device, 2, WIDTH), rows(device, 2, 1, 2, HEADS, 16, DIM)
    lengths = torch.tensor([3, 16], dtype=torch.int32).to(device)
    return lambda: flexkernels.transformer_step_(x, weights, *caches, lengths)


def flow(update, guidance, scalars=False):
    def make(device):
        x, v, u, past = rows(device, 4, 2, 3, 4, 5, 6)
        buffer = torch.zeros_like(x) if isinstance(guidance, APG) and guidance.momentum else None
        settings = {"guidance": guidance, "momentum_buffer": buffer}
        if update == "flow_step":
            return lambda: flexkernels.flow_step(x, v, u, dt=-0.1, **settings)
        function = getattr(flexkernels, update)
        if scalars:
            settings["scalars"] = rows(device, 1, 9)[0]
        return lambda: function([x], [1.0], v, u, b=-0.1, past=[past], past_b=[0.5], **settings)

    return make


def fsq_quantize(device):
    z = rows(device, 7, 3)
    return lambda: flexkernels.fsq_quantize(z, LEVELS)


def fsq_dequantize(device):
    ids = torch.arange(7).to(device)
    return lambda: flexkernels.fsq_dequantize(ids, LEVELS)


def fsq_quantize_train(device):
    z, seed = rows(device, 2, 7, 3), torch.tensor(1).to(device)
    return lambda: flexkernels.fsq_quantize_train(z, LEVELS, seed=seed, drop_p=0.5, corrupt_p=0.2)


def fsq_project_quantize(device):
    hidden, weight, bias = rows(device, 7, 16), rows(device, 3, 16), rows(device, 3)
    return lambda: flexkernels.fsq_project_quantize(hidden, weight, bias, LEVELS)


def fsq_embed(device):
    ids, weight, bias = torch.arange(7).to(device), rows(device, 16, 3), rows(device, 16)
    positions, index = rows(device, 4, 16), (torch.arange(7, dtype=torch.int32) % 4).to(device)
    return lambda: flexkernels.fsq_embed(ids, LEVELS, weight, bias, positions=positions, position_index=index)


def sample_logits(device):
    logits, seed = rows(device, 3, 50), torch.tensor([1, 2, 3]).to(device)
    return lambda: flexkernels.sample_logits(logits, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=seed)


def skinny_linear(device):
    x, weight, bias = rows(device, 2, 16), rows(device, 8, 16), rows(device, 8)
    norm = rows(device, 16)
    return lambda: flexkernels.skinny_linear(x, weight, bias, activation="swiglu", norm_weight=norm)


def causal_conv(device):
    x, bias = rows(device, 1, 4, 6, 6, 8), rows(device, 8)
    convs = [((3, 3, 3), {}), ((1, 3, 3), {"upsample": True}), ((3, 1, 1), {}), ((1, 3, 3), {"stride": 2})]
    weights = [
        flexkernels.prepare_conv(
            rows(device, 8, 8 * taps[0] * taps[1] * taps[2]).unflatten(1, (8, *taps)), bias, **kind
        )
        for taps, kind in convs
    ]
    return lambda: [flexkernels.causal_conv(x, weight) for weight in weights]


def norm_silu(device):
    x, weight, bias = rows(device, 4, 8), rows(device, 8), rows(device, 8)
    return lambda: flexkernels.norm_silu(x, weight, bias)


def cross_entropy(device):
    h, features, ids = rows(device, 9, 12), rows(device, 40, 12), (torch.arange(9) % 40).to(device)
    return lambda: with_gradients(lambda x: codebook_cross_entropy(x, features, ids), (h,))


# name: make(device) -> call; the part before a blank is the op
CALLS = {
    **{name: norms(name) for name in NORMS},
    "attention": attention,
    "decode_attention": decode,
    "kv_append_": kv_append,
    "qk_norm": qk_norm,
    "transformer_step_": transformer_step,
    "flow_step CFG": flow("flow_step", CFG(3.0, 0.7)),
    "flow_step APG": flow("flow_step", APG(25.0, 0.6, 0.1, -0.5)),
    "flow_update": flow("flow_update", CFG(3.0)),
    "flow_update with scalars": flow("flow_update", APG(25.0, 0.6), scalars=True),
    "flow_update_": flow("flow_update_", APG(25.0, 0.6)),
    "fsq_quantize": fsq_quantize,
    "fsq_dequantize": fsq_dequantize,
    "fsq_quantize_train": fsq_quantize_train,
    "fsq_project_quantize": fsq_project_quantize,
    "fsq_embed": fsq_embed,
    "sample_logits": sample_logits,
    "skinny_linear": skinny_linear,
    "causal_conv": causal_conv,
    "norm_silu": norm_silu,
    "codebook_cross_entropy": cross_entropy,
}

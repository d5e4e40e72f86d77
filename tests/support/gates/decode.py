import torch

from flexkernels.triton import decode, head_norm

from .record import Recorder

KERNELS = {
    "decode_split_kernel",
    "decode_merge_kernel",
    "kv_append_kernel",
    "qk_norm_kernel",
    "qk_norm_backward_kernel",
}


def launches():
    found = []
    for module in (decode, head_norm):
        for name in KERNELS & set(vars(module)):
            setattr(module, name, Recorder(getattr(module, name), found))
    # n, heads, kv_heads, head_dim, dtype, norm, whether with weights, rotary embedding and lse
    cases = (
        (1, 4, 4, 64, torch.bfloat16, 1, False),
        (1, 2, 2, 256, torch.float32, 0, False),
        (2, 8, 1, 64, torch.float16, 2, True),
        (16, 4, 2, 256, torch.bfloat16, 1, True),
        (3, 2, 2, 40, torch.float32, 2, True),
        (1, 8, 1, 256, torch.float32, 1, True),
        # every count is 1
        (1, 1, 1, 1, torch.float32, 1, False),
    )
    for n, heads, kv_heads, head_dim, dtype, norm, everything in cases:
        q, k = torch.zeros(2, n, heads, head_dim, dtype=dtype), torch.zeros(2, kv_heads, 512, head_dim, dtype=dtype)
        lengths = torch.zeros(2, dtype=torch.int32)
        weight = torch.zeros(2, 512) if everything else None
        decode.decode_attention_triton(q, k, k, lengths, weight, 0.125, n > 1, everything)
        vector, table = (torch.zeros(head_dim), torch.zeros(512, head_dim // 2)) if everything else (None, None)
        qkv = torch.zeros(2, n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        norms = norm, vector, vector, 1e-5, table, table
        head_norm.kv_append__triton(qkv, k, k, lengths, heads, *norms)
        positions = lengths if everything else None
        qk = qkv[:, 0, : (heads + kv_heads) * head_dim]
        head_norm.qk_norm_triton(qk, heads, kv_heads, *norms, positions)
        head_norm.qk_norm_backward_triton(q[:, 0], k[:, :, 0], qk, *norms, positions)
    return found

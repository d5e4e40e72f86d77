"""The autoregressive step as plain PyTorch writes it: F.linear, F.rms_norm, SDPA over a preallocated cache."""

import torch.nn.functional as F


class Loop:
    """weights under the published names; rows [cond; uncond], one token a call.

    Source: the decoder-only transformer of arXiv 2302.13971 with learned positions and the cache of arXiv 1911.02150,
    section 2.3, by torch.nn.functional.
    """

    def __init__(self, weights: dict, depth: int, rows: int, max_len: int):
        self.w, self.depth = weights, depth
        table = weights["tok_emb.weight"]
        self.cache = table.new_empty(2, depth, rows, depth, max_len, 64)

    def logits(self, ids, position: int):
        """ids [rows] at one position -> [rows, vocab]."""
        w, rows = self.w, len(ids)
        x = w["tok_emb.weight"][ids] + w["pos_emb"][position]
        for i in range(self.depth):
            block = f"blocks.{i}."
            qkv = F.linear(self.norm(x, block + "n1"), w[block + "attn.qkv.weight"])
            q, k, v = qkv.view(rows, 3, self.depth, 64).unbind(1)
            self.cache[0, i, :, :, position], self.cache[1, i, :, :, position] = k, v
            keys, values = self.cache[:, i, :, :, : position + 1]
            out = F.scaled_dot_product_attention(q[:, :, None], keys, values)
            x = x + F.linear(out.reshape(rows, -1), w[block + "attn.proj.weight"])
            h = self.norm(x, block + "n2")
            h = F.silu(F.linear(h, w[block + "ffn.w1.weight"])) * F.linear(h, w[block + "ffn.w3.weight"])
            x = x + F.linear(h, w[block + "ffn.w2.weight"])
        return F.linear(self.norm(x, "norm"), w["head.weight"])

    def norm(self, x, name: str):
        weight = self.w[name + ".weight"]
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    def step(self, ids, position: int, guidance: float):
        """ids [n] -> the most likely next ids [n] under guidance."""
        cond, uncond = self.logits(ids.repeat(2), position).float().chunk(2)
        return (uncond + guidance * (cond - uncond)).argmax(-1)

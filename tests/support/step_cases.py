"""Steps through a stack of blocks, drawn, and the same step by the single ops."""

from dataclasses import replace

import torch

import flexkernels
from flexkernels import BlockWeights, StackWeights

EPS = 1e-6


def draw_blocks(layers, width, hidden, dtype, *, int8=False, cross=False):
    def matrix(n, k):
        weight = torch.randn(n, k).to(dtype) / k**0.5
        return flexkernels.quantize_rows(weight) if int8 else weight

    def norm():
        return (1 + 0.1 * torch.randn(width)).to(dtype)

    return [
        BlockWeights(
            norm(), matrix(3 * width, width), matrix(width, width), norm(), matrix(2 * hidden, width),
            matrix(width, hidden), *((norm(), matrix(width, width), matrix(width, width)) if cross else ()),
        )
        for _ in range(layers)
    ]  # fmt: skip


class Case:
    """Blocks and the arguments of one step, every tensor drawn in its own dtype; caches are views of longer ones."""

    def __init__(self, rows, heads, head_dim, dtype, *, layers=2, hidden=70, contexts=0, **options):
        width = heads * head_dim
        self.blocks = draw_blocks(layers, width, hidden, dtype, cross=contexts > 0, **options)
        self.weights = StackWeights(self.blocks)
        self.x = torch.randn(rows, width).to(dtype)
        self.caches = torch.randn(2, layers, rows + 1, heads, 310, head_dim).to(dtype)
        self.cache_len = torch.randint(1, 300, (rows,), dtype=torch.int32)
        self.cross = {}
        if contexts:
            # keys and values as a transposed projection leaves them
            pairs = torch.randn(layers, contexts, 9, 2, heads, head_dim).to(dtype).permute(0, 3, 1, 4, 2, 5)
            self.cross = {"cross": [tuple(p) for p in pairs], "cross_len": torch.randint(0, 10, (contexts,)).int()}

    def run(self, step, change=lambda t: t):
        """x and both caches after a step."""
        x, (k, v) = change(self.x.clone()), change(self.caches.clone())
        rows, cross = len(x), dict(self.cross)
        if cross:
            cross["cross"] = [(change(k), change(v)) for k, v in cross["cross"]]
        blocks = [replace(b, **{n: widen(t, change) for n, t in vars(b).items()}) for b in self.blocks]
        step(x, StackWeights(blocks), k[:, :rows, :, :300], v[:, :rows, :, :300], self.cache_len, **cross, eps=EPS)
        return x, k, v


def widen(value, change):
    if isinstance(value, tuple):
        return value
    return None if value is None else change(value)


def by_parts(x, weights, k_cache, v_cache, cache_len, *, cross=None, cross_len=None, eps):
    """The step as a caller of the single ops writes it."""
    norms, scales = iter(weights.norms), weights.scales or [None] * len(weights.weights)
    matrices = zip(weights.weights, scales, strict=True)
    heads = k_cache.shape[2]

    def linear(y, **options):
        weight, scale = next(matrices)
        return flexkernels.skinny_linear(y, weight, weight_scale=scale, **options)

    y = x
    for layer, (k, v) in enumerate(zip(k_cache, v_cache, strict=True)):
        normed = flexkernels.rms_norm(y, next(norms)[0], eps=eps)
        q = flexkernels.kv_append_(linear(normed)[:, None], k, v, cache_len, heads=heads)
        y = linear(flexkernels.decode_attention(q, k, v, cache_len).flatten(1), residual=y)
        if cross is not None:
            contexts = len(cross_len)
            q = linear(flexkernels.rms_norm(y, next(norms)[0], eps=eps))
            q = q.view(len(x) // contexts, contexts, heads, -1).transpose(0, 1)
            out = flexkernels.decode_attention(q, *cross[layer], cross_len, causal=False)
            y = linear(out.transpose(0, 1).reshape(x.shape), residual=y)
        normed = flexkernels.rms_norm(y, next(norms)[0], eps=eps)
        y = linear(linear(normed, activation="swiglu"), residual=y)
    x.copy_(y)

"""The generator's layers: the same weights for a packed pass over sequences and for a step of a few tokens a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import flexkernels
from flexkernels import decode_attention, kv_append_, rms_norm, skinny_linear, swiglu

from . import fp8
from .config import GeneratorConfig
from .fp8 import FP8

# rows that skinny_linear serves at once
SKINNY_ROWS = 16
# Rows that are served in parts of at most so many, where reading the weights once a part costs less than what torch
# would do: on a CPU its products of few rows; for int8, which torch has no product of, making a dense matrix.
PARTS = {"cpu": 2 * SKINNY_ROWS, "int8": 4 * SKINNY_ROWS}


def parts(rows: int) -> list[slice]:
    """``rows`` in even parts of at most ``SKINNY_ROWS``, each but the last an even number of rows."""
    count = max(1, -(-rows // SKINNY_ROWS))
    size = 2 * -(-rows // (2 * count))
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), max(size, 1))]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, float32 inside, eps 1e-6 as skinny_linear's norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, eps=1e-6)


class Linear(nn.Module):
    """x ``[m, k]`` -> x W^T ``[m, n]``; after :meth:`quantize`, W is int8 or fp8 with one float32 scale an output."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("scale", None, persistent=False)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """activation(norm(x) W^T + bias) + residual. Up to :meth:`_most` rows a row's bits do not depend on the
        others."""
        training = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        skinny = not training and len(x) <= self._most(x)
        if norm is not None and (self.weight.dtype == FP8 or not skinny):
            x, norm = norm(x), None
        if self.weight.dtype == FP8:
            if fp8.multiplies(x, self.weight):
                return _after(fp8.product(x, self.weight, self.scale, self.bias), residual, activation)
            x = fp8.widen(*fp8.round_rows(x), x.dtype)
        if skinny:
            return self._skinny(x, residual, activation, norm)
        weight = self.dense(x.dtype)
        if residual is not None and self.bias is None and activation is None and not training:
            # the residual is the product's own epilogue
            return torch.addmm(residual, x, weight.T)
        return _after(F.linear(x, weight, self.bias), residual, activation)

    def _most(self, x: torch.Tensor) -> int:
        return PARTS.get("int8" if self.weight.dtype == torch.int8 else x.device.type, SKINNY_ROWS)

    def _skinny(self, x, residual, activation, norm) -> torch.Tensor:
        # fp8 is widened to what the kernel takes
        weight, scale = (self.dense(x.dtype), None) if self.weight.dtype == FP8 else (self.weight, self.scale)
        options = dict(activation=activation, weight_scale=scale, norm_weight=None if norm is None else norm.weight)
        if len(x) <= SKINNY_ROWS:
            return skinny_linear(x, weight, self.bias, residual=residual, **options)
        return torch.cat([
            skinny_linear(
                x[part], weight, self.bias, residual=residual if residual is None else residual[part], **options
            )
            for part in parts(len(x))
        ])  # fmt: skip

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W in ``dtype``, itself where it is not quantized."""
        return self.weight if self.scale is None else (self.weight.float() * self.scale[:, None]).to(dtype)

    def matrix(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """W, or the pair of int8 and scale."""
        return self.weight if self.scale is None else (self.weight, self.scale)

    def quantize(self, weights: str) -> None:
        """W = round(W / scale) as int8 or fp8, with scale = max |W| / 127 or 448 for each output."""
        weight = self.weight.detach().float()
        del self.weight
        if weights == "fp8":
            rounded, scale = fp8.round_rows(weight)
            self.scale = scale[:, 0]
        else:
            self.scale = weight.abs().amax(1).clamp(min=fp8.SMALLEST_SCALE) / 127
            rounded = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.register_buffer("weight", rounded)


def _after(out: torch.Tensor, residual: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    out = swiglu(out) if activation == "swiglu" else out
    return out if residual is None else residual + out


class CrossAttention(nn.Module):
    """Attention to a caption's embeddings, whose keys and values are made once."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.width, config.width)
        self.kv = Linear(config.width, 2 * config.width)
        self.proj = Linear(config.width, config.width)

    def keys_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """context ``[contexts, c, width]`` -> k and v ``[contexts, heads, c, head_dim]``."""
        kv = self.kv(context.flatten(0, 1)).view(*context.shape[:2], 2, -1, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return k, v

    def packed(self, x, residual, k, v, context_len, lengths: Sequence[int]) -> torch.Tensor:
        """Sequence i of the packed x ``[total, width]`` sees the first context_len[i] keys of k[i], v[i]."""
        q = nn.utils.rnn.pad_sequence(self.q(x).unflatten(-1, (-1, self.head_dim)).split(lengths), batch_first=True)
        seen = torch.arange(k.shape[2], device=x.device) < context_len[:, None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen[:, None, None])
        out = out.transpose(1, 2).flatten(2)
        return self.proj(torch.cat([rows[:n] for rows, n in zip(out, lengths, strict=True)]), residual)

    def step(self, x, norm: RMSNorm, k, v, context_len, rows: int) -> torch.Tensor:
        """x + out(norm(x)) of x ``[rows * n, width]``, n tokens a row; k, v ``[contexts, heads, c, head_dim]``: row i
        sees context i % contexts."""
        contexts = len(k)
        q = self.q(x, norm=norm).view(rows // contexts, contexts, len(x) // rows, -1, self.head_dim).transpose(0, 1)
        out = decode_attention(q.flatten(1, 2), k, v, context_len, causal=False)
        return self.proj(out.view(q.shape).transpose(0, 1).reshape(len(x), -1), x)


class SelfAttention(nn.Module):
    """Causal self-attention with a merged qkv projection."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def packed(self, x, residual, layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed x ``[total, width]`` -> residual + out, and k, v ``[total, heads, head_dim]`` for a cache."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(1)
        return self.proj(flexkernels.attention(q, k, v, layout).flatten(1), residual), k, v

    def step(self, x, norm: RMSNorm, k_cache, v_cache, length) -> torch.Tensor:
        """x + out(norm(x)), n tokens a row: x ``[rows * n, width]``, caches ``[rows, heads, max_len, head_dim]``,
        length with these."""
        qkv = self.qkv(x, norm=norm).unflatten(0, (len(length), -1))
        q = kv_append_(qkv, k_cache, v_cache, length, heads=self.heads)
        return self.proj(decode_attention(q, k_cache, v_cache, length).view(len(x), -1), x)


class FeedForward(nn.Module):
    """x + w2(silu(w1 norm(x)) * w3 norm(x)); ``w13`` holds the rows of w1, then those of w3."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.w13 = Linear(config.width, 2 * config.hidden)
        self.w2 = Linear(config.hidden, config.width)

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return self.w2(self.w13(x, activation="swiglu", norm=norm), x)


class Block(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.n1, self.attn = RMSNorm(config.width), SelfAttention(config)
        text = config.cond == "text"
        self.nx, self.xattn = (RMSNorm(config.width), CrossAttention(config)) if text else (None, None)
        self.n2, self.ffn = RMSNorm(config.width), FeedForward(config)

    def weights(self) -> flexkernels.BlockWeights:
        cross = {}
        if self.xattn is not None:
            cross = dict(norm_cross=self.nx.weight, cross_q=self.xattn.q.matrix(), cross_proj=self.xattn.proj.matrix())
        return flexkernels.BlockWeights(
            norm_attn=self.n1.weight, qkv=self.attn.qkv.matrix(), proj=self.attn.proj.matrix(),
            norm_mlp=self.n2.weight, w13=self.ffn.w13.matrix(), w2=self.ffn.w2.matrix(), **cross,
        )  # fmt: skip

    def packed(self, x, layout, lengths, cross) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed x ``[total, width]`` -> x, and this block's k and v; cross: (k, v, context_len), one a sequence."""
        x, k, v = self.attn.packed(self.n1(x), x, layout)
        if cross is not None:
            x = self.xattn.packed(self.nx(x), x, *cross, lengths)
        return self.ffn(x, self.n2), k, v

    def step(self, x, cache, length, cross) -> torch.Tensor:
        """n tokens a row, ``[rows * n, width]``; cache: (k, v); cross: (k, v, context_len) of the contexts."""
        x = self.attn.step(x, self.n1, *cache, length)
        if cross is not None:
            x = self.xattn.step(x, self.nx, *cross, len(length))
        return self.ffn(x, self.n2)

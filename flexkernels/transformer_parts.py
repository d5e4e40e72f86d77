"""`transformer_step_` as a sequence of its parts, whoever serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Parts(NamedTuple):
    """norm(x, weight, eps), linear(x, weight, scale, residual, swiglu), append(qkv, k, v, cache_len, heads) and
    attend(q, k, v, cache_len, causal) of one backend."""

    norm: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    append: Callable[..., torch.Tensor]
    attend: Callable[..., torch.Tensor]

    def step(
        self, x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len, eps, persistent=None
    ) -> None:
        # one kernel for all of it, which `persistent` asks for, is of the CUDA backend alone
        assert not persistent
        norms, cross, heads = iter(norms), iter(cross), k_cache.shape[2]
        matrices = iter(zip(weights, scales or [None] * len(weights), strict=True))

        def normed(y):
            return self.norm(y, next(norms)[0], eps)

        def linear(y, residual=None, swiglu=False):
            return self.linear(y, *next(matrices), residual, swiglu)

        y = x
        for k, v in zip(k_cache, v_cache, strict=True):
            q = self.append(linear(normed(y))[:, None], k, v, cache_len, heads)
            y = linear(self.attend(q, k, v, cache_len, True).flatten(1), y)
            if cross_len is not None:
                contexts = len(cross_len)
                q = linear(normed(y)).view(len(x) // contexts, contexts, heads, -1).transpose(0, 1)
                out = self.attend(q, next(cross), next(cross), cross_len, False)
                y = linear(out.transpose(0, 1).reshape(x.shape), y)
            y = linear(linear(normed(y), swiglu=True), y)
        x.copy_(y)

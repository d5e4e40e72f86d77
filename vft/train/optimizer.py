"""Optimisers of a run: Muon for the matrices of transformer blocks, AdamW for everything else.

Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum, so that all directions of a matrix
move equally. torch's own multiplies in bfloat16, which takes seconds a step on a CPU without such products; here the
dtype is the caller's, matrices of one shape go through together, and sharded ones are gathered.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from . import parallel

OPTIMIZERS = ("muon", "adamw")
ITERATIONS = 5
# of the quintic of each iteration, chosen by Jordan et al. for its slope at 0: singular values end near 1, not at it
QUINTIC = (3.4445, -4.7750, 2.0315)
# the root mean square of AdamW's steps, so that one learning rate does for both (Liu et al., arXiv 2502.16982)
ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """``p -= lr * (weight_decay * p + 0.2 * sqrt(max(p.shape)) * orthogonal(momentum))`` for matrices ``p [m, n]``.

    The momentum is Nesterov's, of averaged gradients. ``dtype`` is that of the matrix products.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"params must be matrices, got one of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                rate = group["lr"] * ADAMW_RMS * math.sqrt(max(shape))
                for p, update in zip(params, orthogonal(momenta.to(self.dtype)).to(momenta.dtype), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(parallel.scatter(update, p), alpha=rate)

    def _momentum(self, p: nn.Parameter, decay: float) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - decay)
        return parallel.whole(p.grad.lerp(state["momentum"], decay), p)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices ``[count, m, n]`` with their singular values brought near 1, 0.7 to 1.2, by Newton-Schulz iterations;
    those below a hundredth or so of the matrix's norm stay smaller."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def make(
    parameters: dict[str, nn.Parameter], name: str, lr: float, weight_decay: float, dtype: torch.dtype
) -> dict[str, torch.optim.Optimizer]:
    """The optimiser of each parameter: ``muon`` for block matrices and AdamW for the rest, or ``adamw`` for all.

    Matrices decay, vectors do not. ``dtype`` is that of Muon's products.
    """
    trained = {key: p for key, p in parameters.items() if p.requires_grad}
    blocks = {key: p for key, p in trained.items() if name == "muon" and p.dim() == 2 and ".blocks." in f".{key}"}
    others = {key: p for key, p in trained.items() if key not in blocks}
    decayed, kept = ([p for p in others.values() if (p.dim() >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    if not blocks:
        return dict.fromkeys(parameters, adamw)
    return dict.fromkeys(parameters, adamw) | dict.fromkeys(
        blocks, Muon(blocks.values(), lr, weight_decay=weight_decay, dtype=dtype)
    )

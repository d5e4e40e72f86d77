"""Low-rank factors on the linear layers of blocks (LoRA, arXiv 2106.09685): W + b a, where W is not trained.

b starts at 0, so a run starts where its checkpoint is. What a run saves as its model has the products added.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

_ORIGINAL, _FACTORS = ".parametrizations.weight.original", ".parametrizations.weight.0"


class Factors(nn.Module):
    """``weight [n, m] + b [n, rank] a [rank, m]``."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def add(model: nn.Module, rank: int, keep: set[str]) -> None:
    """Freezes the model but for the parameters named in ``keep``, and gives every matrix of its blocks factors.

    Raises ValueError for a rank that no matrix has room for.
    """
    named = dict(model.named_parameters())
    layers = [name.removesuffix(".weight") for name, p in named.items() if ".blocks." in f".{name}" and p.dim() == 2]
    most = min(min(named[f"{layer}.weight"].shape) for layer in layers)
    if not 1 <= rank <= most:
        raise ValueError(f"lora must lie between 1 and {most}, got {rank}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in keep)
    for layer in layers:
        module = model.get_submodule(layer)
        parametrize.register_parametrization(module, "weight", Factors(module.weight, rank))


def merged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a model without factors, from those of one that may have some."""
    plain = {}
    for name, value in weights.items():
        if name.endswith(_ORIGINAL):
            layer = name.removesuffix(_ORIGINAL)
            a, b = (weights[f"{layer}{_FACTORS}.{factor}"] for factor in "ab")
            plain[f"{layer}.weight"] = value + b @ a
        elif _FACTORS not in name:
            plain[name] = value
    return plain

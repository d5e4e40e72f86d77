"""Token tables as products of two thin factors: what makes a generator of 64,000 ids a file of a few megabytes.

    tok_emb.weight [vocab, width] = tok_emb.factors.0 [vocab, r] @ tok_emb.factors.1 [r, width]; head.weight likewise

The config's ``factor_rank`` is r. A tensor NAME stored as int8 comes with float16 ``NAME.scale``, one a row. A model is
trained with the factors as its parameters, and read with the products in their place.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flexkernels import fsq_dequantize

from .checkpoint import CheckpointError

TABLES = ("tok_emb", "head")
_SCALE = ".scale"


class FactoredTable(nn.Module):
    """The factors of a table W ``[rows, width]``: F0 ``[rows, r]`` starts as ``features``, F1 ``[r, width]`` small."""

    def __init__(self, features: torch.Tensor, width: int) -> None:
        super().__init__()
        second = torch.empty(features.shape[1], width).normal_(std=0.02)
        self.factors = nn.ParameterList([features.clone(), second])


class FactoredEmbedding(FactoredTable):
    """ids ``[...]`` -> W[ids] ``[..., width]``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first, second = self.factors
        return F.embedding(ids, first) @ second


class FactoredHead(FactoredTable):
    """x ``[m, width]`` -> x W^T ``[m, rows]``, never making W."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.factors
        return F.linear(F.linear(x, second), first)


def fsq_features(levels: tuple[int, ...], rank: int) -> torch.Tensor:
    """Features float32 ``[prod(levels), rank]`` of every FSQ id: orthonormal polynomials of its codes, by degree.

    Column by column degree 1 of each code, degree 2 of each code, ...; with ``sum(L - 1)`` columns any sum of functions
    of single codes is linear in them. Then products of the first degrees of two codes each, so that codes may depend on
    each other; columns beyond are standard normal. Ids near each other start alike.
    """
    codes = fsq_dequantize(torch.arange(torch.Size(levels).numel()), levels).double()
    columns = []
    for degree in range(1, max(levels)):
        for code, size in zip(codes.T, levels, strict=True):
            if degree < size:
                powers = code[:, None] ** torch.arange(degree + 1)
                # the last column of Q: orthogonal to all lower degrees
                columns.append(torch.linalg.qr(powers).Q[:, -1] * len(code) ** 0.5)
    columns += [a * b for a, b in combinations(columns[: len(levels)], 2)]
    features = torch.stack(columns, 1)[:, :rank].float()
    return torch.cat([features, torch.randn(len(codes), rank - features.shape[1])], 1)


def compress(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with the long factors as int8 and their scales."""
    out = dict(tensors)
    for name in (f"{table}.factors.0" for table in TABLES):
        scale = (tensors[name].abs().amax(1).float() / 127).clamp(min=2.0**-24).half()
        out[name + _SCALE] = scale
        out[name] = (tensors[name] / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
    return out


def expand(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a full model; without ``factor_rank`` in the config both come back as they are.

    Raises CheckpointError naming the field, the missing key or the wrong shape.
    """
    if "factor_rank" not in raw:
        return raw, tensors
    raw, tensors = dict(raw), dict(tensors)
    rank = raw.pop("factor_rank")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"factor_rank must be an int of at least 1, got {rank!r}")
    for table in TABLES:
        if f"{table}.weight" in tensors:
            raise CheckpointError(f"{table}.weight must not be given beside its factors")
        first, second = (_float(tensors, f"{table}.factors.{i}") for i in range(2))
        if first.dim() != 2 or second.dim() != 2 or first.shape[1] != rank or len(second) != rank:
            shapes = f"{list(first.shape)} and {list(second.shape)}"
            raise CheckpointError(f"{table}.factors must be [rows, {rank}] and [{rank}, width], got {shapes}")
        tensors[f"{table}.weight"] = first @ second
    return raw, tensors


def _float(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Removes a tensor, and its scale where it is int8, and returns it as float32."""
    names = [name]
    if name in tensors and tensors[name].dtype == torch.int8:
        names.append(name + _SCALE)
    for key in names:
        if key not in tensors:
            raise CheckpointError(f"the checkpoint lacks the key {key}")
    value, *scales = (tensors.pop(key).float() for key in names)
    for scale in scales:
        if scale.shape != value.shape[:1]:
            raise CheckpointError(f"{name}{_SCALE} must have shape {list(value.shape[:1])}, got {list(scale.shape)}")
        value = value * scale[:, None]
    return value

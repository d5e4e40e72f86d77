"""Token tables that are linear in fixed features of the FSQ codes: few weights to train and store, whatever the number
of ids.

    tok_emb.weight [vocab, width] = features [vocab, r] @ tok_emb.projection [r, width]; head.weight likewise

The config's ``fsq_levels`` say that a checkpoint holds projections; a model is read with the products in their place.
"""

from __future__ import annotations

import functools
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import flexkernels

from .checkpoint import CheckpointError

TABLES = ("tok_emb", "head")


class CodebookTable(nn.Module):
    """``features [vocab, r]`` of the ids of ``levels``, and a learned ``projection [r, width]`` that starts small."""

    def __init__(self, levels: tuple[int, ...], width: int) -> None:
        super().__init__()
        features = fsq_features(levels)
        self.register_buffer("features", features, persistent=False)
        self.projection = nn.Parameter(torch.empty(features.shape[1], width).normal_(std=0.02))


class CodebookEmbedding(CodebookTable):
    """ids ``[...]`` -> their rows of the table, ``[..., width]``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.features) @ self.projection


class CodebookHead(CodebookTable):
    """x ``[m, width]`` -> logits ``[m, vocab]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.projection), self.features)

    def cross_entropy(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[m]``: ``-log softmax(self(x))[ids]``, without the logits."""
        return codebook_cross_entropy(F.linear(x, self.projection), self.features, ids)


def codebook_cross_entropy(h: torch.Tensor, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 ``[m]``: ``-log softmax(h features^T)[ids]``, for h ``[m, r]``, features ``[vocab, r]`` and ids int64
    ``[m]``. No gradient flows to the features.

    Its gradient is ``softmax(h features^T) features - features[ids]``, and the first term is what attention makes of
    queries h and of the features as keys and values. So one pass of the attention kernel, which also gives the
    log-sum-exp, is both the loss and its gradient, and ``[m, vocab]`` is never made. On a GPU few rows would leave most
    of it idle, so the ids are split into parts, each a sequence of its own that all rows look at; what the parts give
    is joined by their log-sum-exp. The bits of a result follow the number of parts, which a GPU and m decide.
    """
    return _CodebookCrossEntropy.apply(h, features.to(h.dtype), ids, id_parts(len(h), len(features), h.device))


# rows that a block of the attention kernels takes, and the fewest ids that are worth a part
BLOCK_ROWS, PART_IDS = 64, 1024


def id_parts(rows: int, ids: int, device: torch.device) -> int:
    """Into how many parts `codebook_cross_entropy` splits the ids: two blocks for each multiprocessor, all at once."""
    if device.type != "cuda":
        return 1
    blocks = max(1, -(-rows // BLOCK_ROWS))
    return max(1, min(2 * torch.cuda.get_device_properties(device).multi_processor_count // blocks, ids // PART_IDS))


@functools.lru_cache(maxsize=8)
def _layout(rows: int, keys: int, parts: int, device: torch.device) -> flexkernels.SequenceLayout:
    """Kept, since making one copies to the device: that takes longer than the loss, and a CUDA graph cannot hold it."""
    ends = [keys * (part + 1) // parts for part in range(parts)]
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return flexkernels.SequenceLayout.from_lengths([rows] * parts, "full", device, lengths)


class _CodebookCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, features, ids, parts):
        layout = _layout(len(h), len(features), parts, h.device)
        rows = features[:, None]
        queries = h.repeat(parts, 1)[:, None]
        means, lses = flexkernels.attention(queries, rows, rows, layout, softmax_scale=1.0, return_lse=True)
        means, lses = means.view(parts, *h.shape), lses.view(parts, len(h))
        # of each row, the logarithm of a part's share
        shares = lses.log_softmax(0)
        # the largest part's has the least to round
        mean, lse = (shares.exp()[..., None] * means).sum(0), lses.amax(0) - shares.amax(0)
        target = features[ids].float()
        ctx.save_for_backward(mean - target)
        ctx.dtype = h.dtype
        return lse - (h.float() * target).sum(1)

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(ctx.dtype), None, None, None


def fsq_features(levels: tuple[int, ...]) -> torch.Tensor:
    """Features float32 ``[prod(levels), r]`` of every FSQ id: orthonormal polynomials of its codes, by degree.

    Column by column degree 1 of each code, degree 2 of each code, ...: any sum of functions of single codes is linear
    in these ``sum(L - 1)``. Then products of the first degrees of two codes each, so that codes may depend on each
    other. Ids near each other are alike.
    """
    codes = flexkernels.fsq_dequantize(torch.arange(torch.Size(levels).numel()), levels).double()
    # every level stands in as many ids, so what is orthonormal over levels is so over ids
    single = [code.unique(return_inverse=True) for code in codes.T]
    columns = []
    for degree in range(1, max(levels)):
        for values, level in single:
            if degree < len(values):
                # the last column of Q: orthogonal to all lower degrees; its sign is the power's
                q, r = torch.linalg.qr(values[:, None] ** torch.arange(degree + 1))
                columns.append((q[:, -1] * r[-1, -1].sign() * len(values) ** 0.5)[level])
    columns += [a * b for a, b in combinations(columns[: len(levels)], 2)]
    return torch.stack(columns, 1).float()


def expand(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a full model; without ``fsq_levels`` in the config both come back as they are.

    Raises CheckpointError naming the field, the missing key or the wrong shape.
    """
    if "fsq_levels" not in raw:
        return raw, tensors
    raw, tensors = dict(raw), dict(tensors)
    levels = raw.pop("fsq_levels")
    ints = isinstance(levels, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 1 for n in levels)
    if not ints or torch.Size(levels).numel() != raw.get("vocab"):
        raise CheckpointError(f"fsq_levels must be ints above 1 whose product is vocab, got {levels!r}")
    features = fsq_features(tuple(levels))
    for table in TABLES:
        key = f"{table}.projection"
        if f"{table}.weight" in tensors:
            raise CheckpointError(f"{table}.weight must not be given beside {key}")
        if key not in tensors:
            raise CheckpointError(f"the checkpoint lacks the key {key}")
        projection = tensors.pop(key).float()
        if projection.dim() != 2 or len(projection) != features.shape[1]:
            raise CheckpointError(f"{key} must be [{features.shape[1]}, width], got {list(projection.shape)}")
        tensors[f"{table}.weight"] = features @ projection
    return raw, tensors

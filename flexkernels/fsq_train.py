"""FSQ as it is trained: `fsq_quantize` with quantisation dropout per sample and token corruption.

For sample s and its token i, with uniform numbers u of their own:
    dropped:   u_s < drop_p:     codes = bound(z) / (L // 2), the value before rounding
    corrupted: u_s < apply_p and u_i < rate_s, rate_s uniform in [min_corrupt_p, corrupt_p]:  a uniformly drawn id
Random numbers are integers of a counter-based generator, compared with integers: a seed draws the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import checks, fsq_math
from .fsq import check_quantize, fsq_dequantize, fsq_dequantize_ref, fsq_quantize, fsq_quantize_ref
from .sampling_math import philox

# what the counter's second word says the numbers are for
SAMPLES, TOKENS = 0, 1


def fsq_quantize_train(
    z: torch.Tensor,
    levels: Sequence[int],
    *,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
    sample: torch.Tensor | None = None,
    drop_p: float = 0.0,
    corrupt_p: float = 0.0,
    min_corrupt_p: float | None = None,
    apply_p: float = 1.0,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fsq_quantize` with some samples not rounded and some tokens replaced; codes [..., D] and ids [...].

    z, levels, ids_dtype: as for `fsq_quantize`, z with at least one dimension before the last.
    seed, offset: int, or int64 [] on z's device. All choices are a function of (seed, offset), the number of the sample
        and the place of the token in z alone; count the offset up from step to step.
    sample: int64 or int32 [...], not negative: the sample that each token is of, in packed ragged batches; None where
        samples lie along z's first dimension.
    drop_p: probability that the codes of a sample are bound(z) / (L // 2), not rounded; its ids are those of the
        rounded values.
    corrupt_p, min_corrupt_p: share of a sample's tokens that get a random id and its codes: uniform between the two,
        drawn once a sample; None makes it corrupt_p. apply_p: probability that a sample is corrupted at all.

    Gradient: that of bound(z) / (L // 2), zero where a token was replaced.
    Raises TypeError or ValueError as `fsq_quantize` does, and for probabilities outside [0, 1].
    Source: FlexTok (arXiv 2502.13967), whose FSQ has these two regularisers.
    """
    settings = _check(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype)
    return _noisy(z, *settings, ids_dtype, fsq_quantize, fsq_dequantize)


def fsq_quantize_train_ref(
    z: torch.Tensor,
    levels: Sequence[int],
    *,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
    sample: torch.Tensor | None = None,
    drop_p: float = 0.0,
    corrupt_p: float = 0.0,
    min_corrupt_p: float | None = None,
    apply_p: float = 1.0,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fsq_quantize_train` over `fsq_quantize_ref`: the same results bit by bit, without a gradient of rounding."""
    settings = _check(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype)
    return _noisy(z, *settings, ids_dtype, fsq_quantize_ref, fsq_dequantize_ref)


def _check(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype):
    """levels, seed and offset as tensors, sample, and the four probabilities."""
    check_quantize(z, levels, ids_dtype=ids_dtype)
    if z.dim() < 2:
        checks.reject("z", "have a dimension of samples or tokens before the last", f"shape {list(z.shape)}")
    if sample is not None:
        checks.tensor("sample", sample, checks.INTEGERS)
        checks.shape("sample", sample, z.shape[:-1])
        checks.same_device("sample", sample, "z", z)
    min_corrupt_p = corrupt_p if min_corrupt_p is None else min_corrupt_p
    names = "drop_p", "corrupt_p", "min_corrupt_p", "apply_p"
    chances = tuple(map(_check_chance, names, (drop_p, corrupt_p, min_corrupt_p, apply_p)))
    if chances[2] > chances[1]:
        checks.reject("min_corrupt_p", f"be at most corrupt_p, {chances[1]}", chances[2])
    return levels, _counter("seed", seed, z), _counter("offset", offset, z), sample, *chances


def _check_chance(name: str, value) -> float:
    value = checks.at_least(name, value, 0)
    if value > 1:
        checks.reject(name, "be at most 1", value)
    return value


def _counter(name: str, value, z: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        checks.tensor(name, value, (torch.int64,), 0)
        checks.same_device(name, value, "z", z)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.reject(name, "be an int or an int64 tensor", type(value).__name__, TypeError)
    if not -(2**63) <= value < 2**63:
        checks.reject(name, "fit in 64 bits", value)
    return torch.full((), value, dtype=torch.int64, device=z.device)


def _noisy(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype, quantize, dequantize):
    codes, ids = quantize(z, levels, ids_dtype=ids_dtype)
    if drop_p == 0 and corrupt_p == 0:
        return codes, ids
    if sample is None:
        # one number serves all tokens of a sample
        sample = torch.arange(z.shape[0], device=z.device).view(-1, *[1] * (z.dim() - 2))
    dropped, applied, where, _ = _words(seed, offset, sample.to(torch.int64), SAMPLES)
    if drop_p > 0:
        smooth = fsq_math.smooth(z.float(), levels).to(z.dtype)
        codes = torch.where((dropped < _threshold(drop_p)).unsqueeze(-1), smooth, codes)
    if corrupt_p > 0:
        place = torch.arange(ids.numel(), device=z.device).view(ids.shape)
        chance, high, low, _ = _words(seed, offset, place, TOKENS)
        least, span = _threshold(min_corrupt_p), _threshold(corrupt_p) - _threshold(min_corrupt_p)
        hit = (applied < _threshold(apply_p)) & (chance < least + ((where >> 1) * span >> 31))
        # 63 random bits
        drawn = ((high >> 1 << 32) | low) % math.prod(levels)
        codes = torch.where(hit.unsqueeze(-1), dequantize(drawn, levels, dtype=z.dtype), codes)
        ids = torch.where(hit, drawn, ids.to(torch.int64)).to(ids_dtype)
    return codes, ids


def _words(seed: torch.Tensor, offset: torch.Tensor, index: torch.Tensor, purpose: int) -> list[torch.Tensor]:
    """Four words of 32 random bits, int64 like `index`, for each number there."""
    counter = [index & 0xFFFFFFFF, (index >> 32) * 2 + purpose, offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF]
    return philox(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, counter)


def _threshold(chance: float) -> int:
    """32 random bits lie below it with this probability."""
    return round(chance * 2**32)

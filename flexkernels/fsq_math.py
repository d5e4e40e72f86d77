"""FSQ's formulas in plain PyTorch, and the tables of thresholds and codes that its backends share."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .sampling_math import philox

# dtypes of ids, and how many ids each takes
IDS = {torch.int64: 2**63 - 1, torch.int32: 2**31 - 1, torch.uint16: 2**16}
MAX_LEVEL = 256
MAX_DIMS = 16


class Form(NamedTuple):
    """Which formula: levels symmetric about 0 or those of the paper; tanh or a clamp to [-1, 1]."""

    symmetric: bool = False
    clamp: bool = False


PAPER = Form()


def row(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """[D] float32 on the device of `like`; by fills, since a copy from the host cannot enter a CUDA graph."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=like.device) for value in values])


def half_width(levels: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """[D] float32, L // 2."""
    return row([level // 2 for level in levels], like)


def basis(levels: Sequence[int]) -> list[int]:
    """1, L0, L0 * L1, ...: what one step of each component adds to an id."""
    return [math.prod(levels[:d]) for d in range(len(levels))]


def bound_terms(levels: Sequence[int], like: torch.Tensor, form: Form = PAPER):
    """half, offset, shift [D] float32 of bound(z) = squash(z + shift) * half - offset."""
    half = (row(levels, like) - 1) * (1 + 1e-3) / 2
    offset = row([0.5 * (level % 2 == 0) for level in levels], like)
    return half, offset, offset / half if form.clamp else torch.atanh(offset / half)


def bound(z: torch.Tensor, levels: Sequence[int], form: Form = PAPER) -> torch.Tensor:
    half, offset, shift = bound_terms(levels, z, form)
    return squash(z + shift, form) * half - offset


def squash(z: torch.Tensor, form: Form) -> torch.Tensor:
    return z.clamp(-1, 1) if form.clamp else torch.tanh(z)


def smooth(z: torch.Tensor, levels: Sequence[int], form: Form = PAPER) -> torch.Tensor:
    """The codes before rounding, of float32 z [..., D]."""
    return squash(z, form) if form.symmetric else bound(z, levels, form) / half_width(levels, z)


def level_of(z: torch.Tensor, levels: Sequence[int], form: Form) -> torch.Tensor:
    """float32 z [..., D] -> its levels, 0 .. L - 1, as float32."""
    if form.symmetric:
        return torch.floor((row(levels, z) - 1) * (squash(z, form) + 1) / 2 + 0.5)
    return torch.round(bound(z, levels, form)) + half_width(levels, z)


def code_of(level: torch.Tensor, levels: Sequence[int], symmetric: bool) -> torch.Tensor:
    """The codes of float32 levels [..., D]."""
    if symmetric:
        return 2 / (row(levels, level) - 1) * level - 1
    half = half_width(levels, level)
    return (level - half) / half


def quantize(z, levels, ids_dtype=torch.int64, form=PAPER, codes=True, ids=True):
    """Codes [..., D] in z's dtype and ids [...]; what is not asked for is an empty tensor."""
    # a gradient of floor and round would be zero
    z = z.detach()
    level = level_of(z.float(), levels, form)
    level = torch.where(z.isnan(), torch.zeros_like(level), level)
    out_codes = code_of(level, levels, form.symmetric).to(z.dtype) if codes else z.new_empty(0)
    if not ids:
        return out_codes, z.new_empty(0, dtype=ids_dtype)
    out_ids = sum(level[..., d].to(torch.int64) * step for d, step in enumerate(basis(levels)))
    return out_codes, out_ids.to(ids_dtype)


def dequantize(ids, levels, dtype=torch.float32, symmetric=False):
    """The codes [..., D] of ids [...]."""
    ids = ids.to(torch.int64)
    digits = [ids // step % level for step, level in zip(basis(levels), levels, strict=True)]
    return code_of(torch.stack(digits, -1).float(), levels, symmetric).to(dtype)


# what the second word of a counter says the random numbers are for
OF_SAMPLES, OF_TOKENS = 0, 1


def train(
    z, levels, seed, seeds, offset, offsets, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype,
    quantize=quantize, dequantize=dequantize,
):  # fmt: skip
    """Codes, ids and, where ids may be drawn, whether each is (else empty); fsq_train.py has the formula."""
    z = z.detach()
    codes, ids = quantize(z, levels, ids_dtype)
    replaced = ids.new_empty(0, dtype=torch.bool)
    if sample is None:
        # one number serves all tokens of a sample
        sample = torch.arange(z.shape[0], device=z.device).view(-1, *[1] * (z.dim() - 2))
    counters = [
        torch.full((), value, dtype=torch.int64, device=z.device) if tensor is None else tensor
        for value, tensor in ((seed, seeds), (offset, offsets))
    ]
    dropped, applied, where, _ = _words(*counters, sample.to(torch.int64), OF_SAMPLES)
    if drop_p > 0:
        codes = torch.where((dropped < _chance(drop_p)).unsqueeze(-1), smooth(z.float(), levels).to(z.dtype), codes)
    if corrupt_p > 0:
        place = torch.arange(ids.numel(), device=z.device).view(ids.shape)
        chance, high, low, _ = _words(*counters, place, OF_TOKENS)
        least, span = _chance(min_corrupt_p), _chance(corrupt_p) - _chance(min_corrupt_p)
        replaced = (applied < _chance(apply_p)) & (chance < least + ((where >> 1) * span >> 31))
        # 63 random bits
        drawn = ((high >> 1 << 32) | low) % math.prod(levels)
        codes = torch.where(replaced.unsqueeze(-1), dequantize(drawn, levels, z.dtype), codes)
        ids = torch.where(replaced, drawn, ids.to(torch.int64)).to(ids_dtype)
    return codes, ids, replaced


def _words(seed: torch.Tensor, offset: torch.Tensor, index: torch.Tensor, purpose: int) -> list[torch.Tensor]:
    """Four words of 32 random bits, int64 like `index`, for each number there."""
    counter = [index & 0xFFFFFFFF, (index >> 32) * 2 + purpose, offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF]
    return philox(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, counter)


def _chance(probability: float) -> int:
    """32 random bits lie below it with this probability."""
    return round(probability * 2**32)


# tables


@functools.lru_cache(maxsize=64)
def thresholds(levels: tuple[int, ...], device: torch.device, form: Form = PAPER) -> torch.Tensor:
    """float32 [D, max(levels) - 1]: row d holds the largest z of levels 0 .. L_d - 2, then +inf.

    Found by bisection over all float32 values against the formula as torch evaluates it on the CPU, so every backend
    gives the codes of that formula.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _bisect(levels, form).to(device)


@functools.lru_cache(maxsize=64)
def code_table(levels: tuple[int, ...], device: torch.device, symmetric: bool) -> torch.Tensor | None:
    """float32 [D, max(levels)], the code of each level; None where the kernels divide by L // 2 instead."""
    if not symmetric:
        return None
    with torch.inference_mode(False), torch.no_grad():
        level = torch.arange(max(levels), device="cpu").float().unsqueeze(1)
        return code_of(level, levels, symmetric).t().contiguous().to(device)


@functools.lru_cache(maxsize=64)
def id_table(levels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [2, D]: L // 2 and what one step of each component adds to an id."""
    with torch.inference_mode(False):
        return torch.tensor([[level // 2 for level in levels], basis(levels)], device="cpu").to(device)


def _bisect(levels: tuple[int, ...], form: Form) -> torch.Tensor:
    ends = ordinal(torch.tensor([-math.inf, math.inf], device="cpu"))
    # [max(levels) - 1, D]
    steps = torch.arange(max(levels) - 1, device="cpu").unsqueeze(1).expand(-1, len(levels))
    low, high = torch.full_like(steps, int(ends[0])), torch.full_like(steps, int(ends[1]))
    # level(low) <= step < level(high) throughout; the distance of 2**32 halves each time
    for _ in range(32):
        middle = (low + high) // 2
        below = level_of(from_ordinal(middle), levels, form) <= steps
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    exists = steps < torch.tensor(levels, device="cpu") - 1
    return torch.where(exists, from_ordinal(low), math.inf).t().contiguous()


def ordinal(value: torch.Tensor) -> torch.Tensor:
    """int64 numbers in the order of the float32 values, neighbours one apart (NaN excluded)."""
    bits = value.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def from_ordinal(number: torch.Tensor) -> torch.Tensor:
    bits = torch.where(number < 0, (-number - 1) | -0x80000000, number)
    return bits.to(torch.int32).view(torch.float32)

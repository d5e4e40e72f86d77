"""The arithmetic of `sample_logits` in plain PyTorch, which every backend repeats bit by bit: one rounded float32
operation at a time (no fused multiply-add, own exp2 and log), masses and random bits in integers."""

from __future__ import annotations

import ctypes
import math

import torch

MASS_BITS = 40
TOP_P_BITS = 30
LOG2_E = 1.4426950408889634
# 1 / temperature must stay finite in float32
LARGEST_SCALE = 3e38
# exponents below weigh nothing
SMALLEST_EXPONENT = -126.0
LN2 = 6.93147182e-1
# 2^f - 1 over f, and log(1 + f) - f + f^2 / 2 over f^3: minimax, highest power first
EXP2 = (1.5353362e-4, 1.33988738e-3, 9.61843692e-3, 5.55033237e-2, 2.40226477e-1, 6.93147182e-1, 1.0)
LOG1P = (
    -4.50748056e-2,
    1.04630224e-1,
    -1.31611928e-1,
    1.44783944e-1,
    -1.66473120e-1,
    1.99908614e-1,
    -2.50000954e-1,
    3.33334506e-1,
)


def constants(guidance, temperature, top_k, top_p, min_p, vocab: int):
    """The numbers as kernels take them: float32 values and integers; csrc/ops/sampling.cpp does the same."""
    scale = min(LOG2_E / temperature, LARGEST_SCALE) if temperature > 0 else 0.0
    threshold = max(round(top_p * 2**TOP_P_BITS), 1) if top_p < 1 else 0
    log2_minp = _float32(math.log2(min_p)) if min_p > 0 else -math.inf
    return _float32(guidance), _float32(scale), min(top_k, vocab), threshold, log2_minp


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def sample(logits, uncond, guidance, temperature, top_k, top_p, min_p, seed, seeds, offset, offsets):
    """ids int64 [n] and logprob float32 [n]."""
    numbers = constants(guidance, temperature, top_k, top_p, min_p, logits.shape[1])
    guidance, scale, top_k, top_p, log2_minp = numbers
    x = _guided(logits, uncond, guidance)
    largest = x.amax(1, keepdim=True)
    blank = largest == -math.inf
    if scale == 0:
        # the first of the largest
        ids = torch.where(x == largest, 1, 0).argmax(1)
        return torch.where(blank[:, 0], 0, ids), torch.where(blank[:, 0], math.nan, 0.0).to(torch.float32)
    y = torch.where(x == largest, 0.0, (x - largest) * scale)
    weight = exp2(y)
    kept = _kept(x, weight, top_k, top_p) & (y >= log2_minp) & (x > -math.inf)
    weight = torch.where(kept, weight, 0.0)
    bits = random_bits(x.shape[1], _streams(x.shape[0], x.device, seed, seeds, offset, offsets))
    times = torch.where(weight > 0, exponential(bits) / weight, math.inf)
    ids = torch.where(times == times.amin(1, keepdim=True), 1, 0).argmax(1)
    total = mass(weight).sum(1).to(torch.float32) * 2.0**-MASS_BITS
    logprob = y.gather(1, ids[:, None])[:, 0] * LN2 - log(total)
    return torch.where(blank[:, 0], 0, ids), torch.where(blank[:, 0], math.nan, logprob)


def _guided(logits, uncond, guidance):
    x = logits.float()
    if uncond is not None:
        uncond = uncond.float()
        x = uncond + guidance * (x - uncond)
    # -0 becomes 0
    return torch.where(x.isnan(), -math.inf, x) + 0.0


def _kept(x, weight, top_k, top_p):
    """bool [n, vocab]: what top-k and top-p leave."""
    ordered, order = x.sort(1, descending=True)
    kept = x >= ordered[:, top_k - 1 : top_k]
    if top_p:
        masses = mass(torch.where(kept, weight, 0.0)).gather(1, order)
        running = masses.cumsum(1)
        # the mass of larger logits: what runs up to the first of the equal ones
        first = torch.searchsorted(-ordered, -x.contiguous())
        above = torch.nn.functional.pad(running, (1, 0)).gather(1, first)
        total = running[:, -1:]
        high, low = total >> TOP_P_BITS, total & (2**TOP_P_BITS - 1)
        kept &= above < (high * top_p + ((low * top_p) >> TOP_P_BITS)).clamp_min(1)
    return kept


def mass(weight):
    """Weights in [0, 1] as multiples of 2^-40, int64."""
    return (weight * 2.0**MASS_BITS).to(torch.int64)


def _horner(x, coefficients):
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def exp2(y):
    """2^y for y <= 0, and 0 below 2^-126; float32, relative error 1.2e-7."""
    at = y.clamp_min(SMALLEST_EXPONENT)
    whole = torch.round(at)
    value = _horner(at - whole, EXP2)
    power = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(y >= SMALLEST_EXPONENT, value * power, 0.0)


def log1p(f):
    """log(1 + f) for f in [-1/4, 1/2]; float32, relative error 1.5e-7."""
    square = f * f
    return f + ((f * square) * _horner(f, LOG1P) + square * -0.5)


def log(v):
    """log(v) for normal v > 0, float32."""
    bits = v.view(torch.int32)
    exponent = (bits - 0x3F400000) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return exponent.to(torch.float32) * LN2 + log1p(f)


def exponential(bits):
    """-log(1 - u) with u = (bits + 1/2) / 2^31, exact to float32 near 0; bits int32 >= 0."""
    u, rest = ((b.to(torch.float32) + 0.5) * 2.0**-31 for b in (bits, 0x7FFFFFFF - bits))
    return torch.where(u <= 0.25, -log1p((-u).clamp_min(-0.25)), -log(rest))


def _streams(n, device, seed, seeds, offset, offsets):
    """seed, row, offset, each int64 [n, 1]."""
    rows = torch.arange(n, device=device) if seeds is None else torch.zeros(n, dtype=torch.int64, device=device)
    seeds = torch.full_like(rows, seed) if seeds is None else seeds
    offsets = torch.full_like(rows, offset) if offsets is None else offsets
    return tuple(value[:, None] for value in (seeds, rows, offsets))


def random_bits(vocab, streams):
    """31 random bits a token, int32 [n, vocab].

    The tokens 64 t + 16 j + l with j = 0 .. 3 share the Philox block 16 t + l and take its word j.
    """
    seed, row, offset = streams
    tiles = -(-vocab // 64)
    block = torch.arange(16 * tiles, device=seed.device)[None].expand(seed.shape[0], -1)
    counter = [block, row & 0xFFFFFFFF, offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF]
    words = philox(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, counter)
    words = torch.stack([word.view(-1, tiles, 16) for word in words], 2)
    return (words.flatten(1)[:, :vocab] >> 1).to(torch.int32)


def philox(low, high, counter):
    """Philox-4x32-10: four words of 32 bits, held in int64, whose products wrap around like unsigned ones."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32 & 0xFFFFFFFF) ^ counter[1] ^ low,
            second & 0xFFFFFFFF,
            (first >> 32 & 0xFFFFFFFF) ^ counter[3] ^ high,
            first & 0xFFFFFFFF,
        ]
        low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
    return counter

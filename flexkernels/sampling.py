"""Drawing a token from logits: `sample_logits` and its reference, without a sort and with the same draws everywhere.

Per row, with x = uncond + guidance * (logits - uncond), y = (x - max x) * log2(e) / temperature and w = 2^y:
    top-k:  keeps x >= the k-th largest x
    top-p:  keeps x where the kept tokens of larger x hold less than top_p of the mass
    min-p:  keeps y >= log2(min_p)
    draw:   the kept token of the least E / w, where E = -log(1 - u) of its own random u (a Gumbel-max draw, with
            the exponential taken of both sides)
"""

from __future__ import annotations

import ctypes
import math

import torch

from . import checks, legacy

MAX_VOCAB = 2**18
MASS_BITS = 40
TOP_P_BITS = 30
LOG2_E = 1.4426950408889634
# 1 / temperature must stay finite in float32
LARGEST_SCALE = 3e38
# exponents below weigh nothing
SMALLEST_EXPONENT = -126.0


def sample_logits(
    logits: torch.Tensor,
    *,
    uncond_logits: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | torch.Tensor = 0,
    offset: int | torch.Tensor = 0,
    return_logprob: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row: ids int64 [n], and with return_logprob also logprob float32 [n]. Not differentiable.

    logits: [n, vocab] float32, bfloat16 or float16, vocab from 1 to 2**18; rows may be apart (stride(1) is 1, or a
        copy is made). n = 0 gives empty results.
    uncond_logits: like logits; then uncond + guidance * (logits - uncond), in float32, takes their place.
    temperature: divides the logits; 0 takes the largest one (the lowest index among equals) and no filter matters.
    top_k: keeps the top_k largest logits, and every logit equal to the smallest of them.
    top_p: of what top_k left, keeps a token where those of larger logit hold less than top_p of the mass, so the
        token that crosses top_p stays, and equal logits stay or go together. In steps of 2**-30.
    min_p: of what is left, keeps tokens at least min_p times as probable as the most probable one.
    seed, offset: int, or int64 [n] on the logits' device with a value a row (a captured CUDA graph reads them anew).
        The random number of a token is a function of (seed, offset, index) alone where seed is a tensor, so a row
        draws the same in any place of any batch; an int seed gives each row a stream of its own besides. A row must
        not see the same (seed, offset) twice: count the offset up from draw to draw.
    return_logprob: also gives the log-probability of the drawn token among the kept ones, their mass made 1
        (0 for temperature 0).

    NaN logits, and the NaN that guidance makes of infinite ones, count as -inf, which is never drawn: a row without
    any other logit gives id 0 and logprob NaN. Where the largest logit is +inf, tokens at +inf share all the mass.
    Tokens 2**-126 times as probable as the first or less are never drawn. Masses are sums of weights cut to multiples
    of 2**-40 of the largest weight, in 64-bit integers.

    The ids and logprobs are the same on every backend, bit by bit: every floating-point operation in them is one IEEE
    float32 operation (no fused multiply-add, own exp2 and log), everything else is integers. Random numbers are
    Philox-4x32-10 with the counter (block, row, offset) and the key seed; u has 31 bits.
    torch.compile takes the numbers (not the tensors) as constants, except int seeds and offsets.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or numbers: top_k < 1, top_p outside (0, 1],
    min_p outside [0, 1), a negative or NaN temperature.
    Source: Salmon et al., SC 2011 (Philox); arXiv 1904.09751 (top-p); arXiv 2407.01082 (min-p).
    """
    arguments = _check(logits, uncond_logits, guidance, temperature, top_k, top_p, min_p, seed, offset, return_logprob)
    ids, logprob = _sample_op(*arguments)
    return (ids, logprob) if return_logprob else ids


def sample_logits_ref(
    logits: torch.Tensor,
    *,
    uncond_logits: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | torch.Tensor = 0,
    offset: int | torch.Tensor = 0,
    return_logprob: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `sample_logits` in plain PyTorch, with a sort; the same ids and logprobs bit by bit."""
    arguments = _check(logits, uncond_logits, guidance, temperature, top_k, top_p, min_p, seed, offset, return_logprob)
    ids, logprob = _reference(*_constants(arguments[:-1]))
    return (ids, logprob) if return_logprob else ids


# validation


def _check(logits, uncond, guidance, temperature, top_k, top_p, min_p, seed, offset, return_logprob):
    """The op's arguments: a value that is no filter stands where there is none."""
    checks.tensor("logits", logits, checks.FLOATS, 2)
    vocab = logits.shape[1]
    if not 1 <= vocab <= MAX_VOCAB:
        checks.reject("logits", f"have between 1 and {MAX_VOCAB} columns", vocab)
    guidance = checks.finite("guidance", guidance)
    if uncond is not None:
        checks.tensor("uncond_logits", uncond, (logits.dtype,))
        checks.like("uncond_logits", uncond, "logits", logits)
    elif guidance != 1:
        checks.reject("guidance", "be 1 without uncond_logits", guidance)
    temperature = checks.at_least("temperature", temperature, 0)
    if top_k is None:
        top_k = MAX_VOCAB
    elif isinstance(top_k, bool) or not isinstance(top_k, int):
        checks.reject("top_k", "be an int or None", type(top_k).__name__, TypeError)
    elif top_k < 1:
        checks.reject("top_k", "be at least 1", top_k)
    top_p = 1.0 if top_p is None else checks.finite("top_p", top_p)
    if not 0 < top_p <= 1:
        checks.reject("top_p", "be above 0 and at most 1", top_p)
    min_p = 0.0 if min_p is None else checks.finite("min_p", min_p)
    if not 0 <= min_p < 1:
        checks.reject("min_p", "be at least 0 and below 1", min_p)
    seed, seeds = _per_row("seed", seed, logits)
    offset, offsets = _per_row("offset", offset, logits)
    numbers = guidance, temperature, min(top_k, MAX_VOCAB), top_p, min_p
    return logits, uncond, *numbers, seed, seeds, offset, offsets, bool(return_logprob)


def _per_row(name: str, value, logits: torch.Tensor):
    """An int and None, or 0 and a tensor."""
    if isinstance(value, torch.Tensor):
        checks.tensor(name, value, (torch.int64,))
        checks.shape(name, value, logits.shape[:1])
        checks.same_device(name, value, "logits", logits)
        return 0, value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.reject(name, "be an int or an int64 tensor", type(value).__name__, TypeError)
    if not -(2**63) <= value < 2**63:
        checks.reject(name, "fit in 64 bits", value)
    return value, None


# the op


def _constants(arguments):
    """The numbers as kernels take them: float32 values and integers, worked out once for all backends."""
    logits, uncond, guidance, temperature, top_k, top_p, min_p, *streams = arguments
    scale = min(LOG2_E / temperature, LARGEST_SCALE) if temperature > 0 else 0.0
    threshold = max(round(top_p * 2**TOP_P_BITS), 1) if top_p < 1 else 0
    log2_minp = _float32(math.log2(min_p)) if min_p > 0 else -math.inf
    top_k = min(top_k, logits.shape[1])
    return logits, uncond, _float32(guidance), _float32(scale), top_k, threshold, log2_minp, *streams


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _sample_impl(logits, uncond, *rest):
    ids, logprob = _sample_fake(logits, uncond, *rest)
    if ids.numel() == 0:
        return ids, logprob
    logits, uncond = _rows(logits), None if uncond is None else _rows(uncond)
    *arguments, return_logprob = rest
    *arguments, seed, seeds, offset, offsets = arguments
    seeds, offsets = (None if value is None else value.contiguous() for value in (seeds, offsets))
    arguments = _constants((logits, uncond, *arguments, seed, seeds, offset, offsets))
    legacy.launch("sample_logits", *arguments, ids, logprob if return_logprob else None)
    return ids, logprob


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def _sample_fake(logits, *rest):
    n = logits.shape[0]
    # a result that does not exist is an empty tensor: an op cannot return None
    return (
        logits.new_empty((n,), dtype=torch.int64),
        logits.new_empty((n if rest[-1] else 0,), dtype=torch.float32),
    )


_sample_op = legacy.define(
    "sample_logits",
    "(Tensor logits, Tensor? uncond, float guidance, float temperature, int top_k, float top_p, float min_p, "
    "SymInt seed, Tensor? seeds, SymInt offset, Tensor? offsets, bool return_logprob) -> (Tensor, Tensor)",
    _sample_impl,
    _sample_fake,
)


# the reference; what bit-by-bit equality rests on: one rounded float32 operation at a time


def _reference(logits, uncond, guidance, scale, top_k, top_p, log2_minp, seed, seeds, offset, offsets):
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


# backends: each fills ids [n] and logprob [n] (or None) from logits with contiguous rows


def sample_logits_reference(*args):
    *arguments, ids, logprob = args
    drawn, value = _reference(*arguments)
    ids.copy_(drawn)
    if logprob is not None:
        logprob.copy_(value)


def sample_logits_native(*args):
    torch.ops.flexkernels_native.sample_logits(*args)


def sample_logits_triton(*args):
    from .triton import sampling

    sampling.sample_logits_triton(*args)


legacy.register("sample_logits", "reference", sample_logits_reference)
legacy.register("sample_logits", "cpu", sample_logits_native)
legacy.register("sample_logits", "triton", sample_logits_triton)
legacy.register("sample_logits", "cuda", sample_logits_native)

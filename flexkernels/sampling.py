"""Drawing a token from logits: `sample_logits` and its reference, without a sort and with the same draws everywhere.

Per row, with x = uncond + guidance * (logits - uncond), y = (x - max x) * log2(e) / temperature and w = 2^y:
    top-k:  keeps x >= the k-th largest x
    top-p:  keeps x where the kept tokens of larger x hold less than top_p of the mass
    min-p:  keeps y >= log2(min_p)
    draw:   the kept token of the least E / w, where E = -log(1 - u) of its own random u (a Gumbel-max draw, with
            the exponential taken of both sides)
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from . import checks, library, sampling_math
from .typed import as_typed

MAX_VOCAB = 2**18


@overload
def sample_logits(
    logits: torch.Tensor, *, uncond_logits: torch.Tensor | None = ..., guidance: float = ..., temperature: float = ...,
    top_k: int | None = ..., top_p: float | None = ..., min_p: float | None = ..., seed: int | torch.Tensor = ...,
    offset: int | torch.Tensor = ..., return_logprob: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def sample_logits(
    logits: torch.Tensor, *, uncond_logits: torch.Tensor | None = ..., guidance: float = ..., temperature: float = ...,
    top_k: int | None = ..., top_p: float | None = ..., min_p: float | None = ..., seed: int | torch.Tensor = ...,
    offset: int | torch.Tensor = ..., return_logprob: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def sample_logits(
    logits: torch.Tensor, *, uncond_logits: torch.Tensor | None = ..., guidance: float = ..., temperature: float = ...,
    top_k: int | None = ..., top_p: float | None = ..., min_p: float | None = ..., seed: int | torch.Tensor = ...,
    offset: int | torch.Tensor = ..., return_logprob: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
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
    numbers = guidance, temperature, top_k, top_p, min_p
    ids, logprob = _sample_op(*_arguments(logits, uncond_logits, *numbers, seed, offset, return_logprob))
    return (ids, logprob) if return_logprob else ids


@as_typed(sample_logits)
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
    numbers = guidance, temperature, top_k, top_p, min_p
    arguments = _arguments(logits, uncond_logits, *numbers, seed, offset, return_logprob)
    _check_sample_logits(*arguments)
    ids, logprob = sampling_math.sample(*arguments[:-1])
    return (ids, logprob) if return_logprob else ids


# validation


def _arguments(logits, uncond, guidance, temperature, top_k, top_p, min_p, seed, offset, return_logprob):
    """The op's arguments: a value that is no filter stands where there is none."""
    top_k = MAX_VOCAB if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    min_p = 0.0 if min_p is None else min_p
    seed, seeds = (0, seed) if isinstance(seed, torch.Tensor) else (seed, None)
    offset, offsets = (0, offset) if isinstance(offset, torch.Tensor) else (offset, None)
    numbers = guidance, temperature, top_k, top_p, min_p
    arguments = logits, uncond, *numbers, seed, seeds, offset, offsets, bool(return_logprob)
    # to a schema a bool is a number
    if bool in (type(guidance), type(temperature), type(top_k), type(top_p), type(min_p), type(seed), type(offset)):
        _check_sample_logits(*arguments)
    return arguments


def _check_sample_logits(
    logits, uncond, guidance, temperature, top_k, top_p, min_p, seed, seeds, offset, offsets, return_logprob
):
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
    checks.at_least("temperature", temperature, 0)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        checks.reject("top_k", "be an int or None", type(top_k).__name__, TypeError)
    if top_k < 1:
        checks.reject("top_k", "be at least 1", top_k)
    if not 0 < checks.finite("top_p", top_p) <= 1:
        checks.reject("top_p", "be above 0 and at most 1", top_p)
    if not 0 <= checks.finite("min_p", min_p) < 1:
        checks.reject("min_p", "be at least 0 and below 1", min_p)
    _check_per_row("seed", seed, seeds, logits)
    _check_per_row("offset", offset, offsets, logits)


def _check_per_row(name: str, value, values: torch.Tensor | None, logits: torch.Tensor):
    """An int, or a tensor with one for each row."""
    if values is not None:
        checks.tensor(name, values, (torch.int64,))
        checks.shape(name, values, logits.shape[:1])
        checks.same_device(name, values, "logits", logits)
    elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.reject(name, "be an int or an int64 tensor", type(value).__name__, TypeError)
    elif not -(2**63) <= value < 2**63:
        checks.reject(name, "fit in 64 bits", value)


# the op


def _sample_logits_reference(*arguments):
    *arguments, return_logprob = arguments
    ids, logprob = sampling_math.sample(*arguments)
    return ids, logprob if return_logprob else logprob[:0]


def _sample_logits_fake(logits, *rest):
    n = logits.shape[0]
    # a result that does not exist is an empty tensor: an op cannot return None
    return (
        logits.new_empty((n,), dtype=torch.int64),
        logits.new_empty((n if rest[-1] else 0,), dtype=torch.float32),
    )


_sample_op = library.Op(
    "sample_logits",
    "(Tensor logits, Tensor? uncond, float guidance, float temperature, int top_k, float top_p, float min_p, "
    "SymInt seed, Tensor? seeds, SymInt offset, Tensor? offsets, bool return_logprob) -> (Tensor, Tensor)",
    check=_check_sample_logits,
    reference=_sample_logits_reference,
    fake=_sample_logits_fake,
    triton="sampling",
    jvp=None,
)

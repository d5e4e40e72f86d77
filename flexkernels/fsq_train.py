"""FSQ as it is trained: `fsq_quantize` with quantisation dropout per sample and token corruption.

For sample s and its token i, with uniform numbers u of their own:
    dropped:   u_s < drop_p:     codes = bound(z) / (L // 2), the value before rounding
    corrupted: u_s < apply_p and u_i < rate_s, rate_s uniform in [min_corrupt_p, corrupt_p]:  a uniformly drawn id
Random numbers are integers of a counter-based generator, compared with integers: a seed draws the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import checks, fsq_math, library
from .fsq import check_quantize, straight_through, with_slope


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

    Ids, and the codes that are rounded, are the same on every device, bit by bit. Codes that are not rounded are those
    of the tanh of z's device: the same bits in every call there, and within 2**-20 of those of another device before
    they are rounded to z's dtype.

    Gradient: that of bound(z) / (L // 2), zero where a token was replaced.
    Raises TypeError or ValueError as `fsq_quantize` does, and for probabilities outside [0, 1].
    Source: FlexTok (arXiv 2502.13967), whose FSQ has these two regularisers.
    """
    arguments = _arguments(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype)
    codes, ids, _ = _train_op(*arguments)
    return codes, ids


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
    """The specification of `fsq_quantize_train` in plain PyTorch, without a gradient; the same bits on the CPU."""
    arguments = _arguments(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype)
    _check(*arguments)
    codes, ids, _ = fsq_math.train(*arguments)
    return codes, ids


def _arguments(z, levels, seed, offset, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype):
    """Those of the op: a counter is a number, or a tensor beside a 0."""
    seed, seeds = (0, seed) if isinstance(seed, torch.Tensor) else (seed, None)
    offset, offsets = (0, offset) if isinstance(offset, torch.Tensor) else (offset, None)
    least = corrupt_p if min_corrupt_p is None else min_corrupt_p
    # what the op would take for a number
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, bool):
            checks.reject(name, "be an int or an int64 tensor", "bool", TypeError)
    for name, value in (("drop_p", drop_p), ("corrupt_p", corrupt_p), ("apply_p", apply_p), ("min_corrupt_p", least)):
        if not isinstance(value, float):
            checks.finite(name, value)
    return z, levels, seed, seeds, offset, offsets, sample, drop_p, corrupt_p, least, apply_p, ids_dtype


def _check(z, levels, seed, seeds, offset, offsets, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype):
    check_quantize(z, levels, ids_dtype=ids_dtype)
    if z.dim() < 2:
        checks.reject("z", "have a dimension of samples or tokens before the last", f"shape {list(z.shape)}")
    if sample is not None:
        checks.tensor("sample", sample, checks.INTEGERS)
        checks.shape("sample", sample, z.shape[:-1])
        checks.same_device("sample", sample, "z", z)
    names = "drop_p", "corrupt_p", "min_corrupt_p", "apply_p"
    for name, value in zip(names, (drop_p, corrupt_p, min_corrupt_p, apply_p), strict=True):
        if checks.at_least(name, value, 0) > 1:
            checks.reject(name, "be at most 1", value)
    if min_corrupt_p > corrupt_p:
        checks.reject("min_corrupt_p", f"be at most corrupt_p, {corrupt_p}", min_corrupt_p)
    _check_counter("seed", seed, seeds, z)
    _check_counter("offset", offset, offsets, z)


def _check_counter(name: str, value, tensor, z: torch.Tensor):
    if tensor is not None:
        checks.tensor(name, tensor, (torch.int64,), 0)
        checks.same_device(name, tensor, "z", z)
    elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.reject(name, "be an int or an int64 tensor", type(value).__name__, TypeError)
    elif not -(2**63) <= value < 2**63:
        checks.reject(name, "fit in 64 bits", value)


# shapes and gradients


def _fake(z, levels, seed, seeds, offset, offsets, sample, drop_p, corrupt_p, min_corrupt_p, apply_p, ids_dtype):
    ids = z.new_empty(z.shape[:-1], dtype=ids_dtype)
    return z.new_empty(z.shape), ids, ids.new_empty(ids.shape if corrupt_p > 0 else (0,), dtype=torch.bool)


def _setup(ctx, inputs, output):
    z, ctx.levels = inputs[:2]
    ctx.corrupted = inputs[8] > 0
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(z, output[2])


def _backward(ctx, grad_codes, *_):
    z, replaced = ctx.saved_tensors
    if ctx.corrupted:
        grad_codes = grad_codes.masked_fill(replaced.unsqueeze(-1), 0)
    return straight_through(grad_codes, z, ctx.levels), *(None,) * 11


def _jvp(z, levels, *arguments):
    codes, ids, replaced = fsq_math.train(z.detach(), levels, *arguments)
    kept = torch.ones((), dtype=torch.bool, device=z.device) if replaced.shape != ids.shape else ~replaced
    return with_slope(codes, z, levels, where=kept.unsqueeze(-1)), ids, replaced


_train_op = library.Op(
    "fsq_quantize_train",
    "(Tensor z, int[] levels, SymInt seed, Tensor? seeds, SymInt offset, Tensor? offsets, Tensor? sample, "
    "float drop_p, float corrupt_p, float min_corrupt_p, float apply_p, ScalarType ids_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=fsq_math.train,
    fake=_fake,
    triton="fsq",
    setup_context=_setup,
    backward=_backward,
    jvp=_jvp,
)

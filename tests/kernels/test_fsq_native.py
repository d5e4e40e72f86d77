"""The CPU kernels of FSQ against the formula, at every ISA level."""

import math

import pytest
import torch
from helpers import FLOATS, repeat_at_level

import flexkernels
from flexkernels import _native, fsq_math

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")

LEVELS = ([2], [3, 2], [8, 8, 8, 5, 5, 5], [33, 34, 7], [256, 2, 100], [5] * 16)
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_kernel_quantize(levels, dtype):
    ids_dtypes = [t for t, most in fsq_math.IDS.items() if math.prod(levels) <= most]
    for n in (0, 1, 15, 16, 17, 151, 6001):
        z = (torch.randn(n, len(levels)) * 2).to(dtype)
        want_codes, want_ids = flexkernels.fsq_quantize_ref(z, levels)
        for ids_dtype in ids_dtypes:
            codes, ids = flexkernels.fsq_quantize(z, levels, ids_dtype=ids_dtype)
            assert torch.equal(codes, want_codes) and torch.equal(ids.long(), want_ids), (n, levels)


@pytest.mark.parametrize("levels", ([8, 5], [64, 3], [5] * 16), ids=str)
def test_kernel_quantize_edges(levels):
    """A threshold itself is not passed, NaN is level 0, infinities are the outer levels."""
    limits = fsq_math.thresholds(tuple(levels), torch.device("cpu"))
    ends = torch.tensor([math.nan, math.inf, -math.inf]).unsqueeze(1).expand(-1, len(levels))
    up, down = (torch.nextafter(limits, torch.tensor(end)) for end in (math.inf, -math.inf))
    z = torch.cat([limits.T, up.T, down.T, ends])
    codes, ids = flexkernels.fsq_quantize(z, levels)
    want_codes, want_ids = flexkernels.fsq_quantize_ref(z, levels)
    assert torch.equal(codes, want_codes) and torch.equal(ids, want_ids)
    assert ids[-3:].tolist() == [0, math.prod(levels) - 1, 0]


def test_kernel_one_output_only():
    levels, z = [8, 5, 7], torch.randn(50, 3)
    want_codes, want_ids = flexkernels.fsq_quantize_ref(z, levels)
    assert torch.equal(flexkernels.fsq_quantize(z, levels, ids=False)[0], want_codes)
    assert torch.equal(flexkernels.fsq_quantize(z, levels, codes=False, ids_dtype=torch.int32)[1].long(), want_ids)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", [*LEVELS, [256] * 7], ids=str)
def test_kernel_dequantize(levels, dtype):
    codebook = math.prod(levels)
    basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))])
    level, half = torch.tensor(levels), torch.tensor(levels) // 2
    for n in (0, 1, 17, 4001):
        ids = torch.randint(codebook, (n,))
        want = ((ids[:, None] // basis % level - half).float() / half.float()).to(dtype)
        for given_ids in [ids, ids.int()] if codebook < 2**31 else [ids]:
            assert torch.equal(flexkernels.fsq_dequantize(given_ids, levels, dtype=dtype), want)


@pytest.mark.parametrize(
    "levels",
    [[256, 256, 64], [255, 253, 65], [256, 241, 68], [3, 251, 255, 22], [2] * 15 + [128], [7] * 7, [256] * 3],
    ids=str,
)
def test_kernel_dequantize_next_to_every_kind_of_multiple(levels):
    """Ids around the multiples of the bases, where a rounded quotient would be wrong, in codebooks around 2^22."""
    codebook = math.prod(levels)
    basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))])
    level, half = torch.tensor(levels), torch.tensor(levels) // 2
    near = [torch.arange(0, codebook + step, step)[-3000:] for step in (*basis.tolist(), codebook)]
    ids = torch.cat([multiple + shift for multiple in near for shift in (-1, 0, 1)])
    ids = ids[(ids >= 0) & (ids < codebook)]
    codes = flexkernels.fsq_dequantize(ids, levels)
    assert torch.equal(codes, (ids[:, None] // basis % level - half).float() / half.float())


@pytest.mark.parametrize("foreign", [-1, 40, 2**62, -(2**63)])
@pytest.mark.parametrize("place", [0, 20, 79, 80])
def test_kernel_dequantize_sees_a_foreign_id(foreign, place):
    ids = torch.arange(40).repeat(3)[:81]
    ids[place] = foreign
    for symmetric in (False, True):
        with pytest.raises(ValueError, match="ids must lie between 0 and 39, got"):
            flexkernels.fsq_dequantize(ids, [8, 5], symmetric=symmetric)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_isa_level(level):
    repeat_at_level(__file__, "test_kernel", level)

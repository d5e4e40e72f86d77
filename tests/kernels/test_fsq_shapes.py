"""FSQ kernels at every shape that chooses another path: dimensions, levels, row counts, alignment, widths."""

import math

import pytest
import torch
from helpers import FLOATS, interpreted, on_every_backend

import flexkernels
from flexkernels import fsq_math

PUBLISHED = [8, 8, 8, 5, 5, 5]
# up to 8 dimensions of up to 16 levels, and what lies beyond
LEVEL_SETS = [
    PUBLISHED,
    [7, 5, 5, 5],
    [2, 3, 4],
    [16, 16],
    [16] * 8,
    [9, 2, 16, 3, 5, 7, 8],
    [4],
    [17],
    [256],
    [2] * 16,
]
# width, dims, rows of the projection: one row and two a warp, packs of four and not, weights in shared memory and not
WIDTHS = [
    *((4, 6, 9), (512, 6, 5), (516, 16, 5), (1152, 3, 3), (1156, 6, 3)),
    *((2048, 6, 3), (2048, 16, 5), (2052, 6, 5), (8192, 2, 3), (9001, 1, 1)),
]
every_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def neighbours(limits, dtype):
    """Each threshold as dtype rounds it, and the floats of that dtype around it."""
    middle = limits.to(dtype)
    ends = (torch.tensor(end, dtype=dtype) for end in (math.inf, -math.inf))
    return torch.cat([middle, *(torch.nextafter(middle, end) for end in ends)], -1)


def unaligned(tensor):
    """The same values, from an address that is a multiple of nothing but the element."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def skip_unrounded(place, dtype):
    if interpreted(place) and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding")


@on_every_backend
@every_dtype
@every_set
def test_around_every_threshold(place, levels, dtype):
    if place[0] == "reference" and place[1] != "cpu":
        pytest.skip("the reference evaluates the formula with the GPU's tanh")
    skip_unrounded(place, dtype)
    z = neighbours(fsq_math.thresholds(tuple(levels), torch.device("cpu")), dtype).t()
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype).unsqueeze(1)
    z = torch.cat([z, special.expand(-1, len(levels))]).contiguous()
    with flexkernels.backend(place[0]):
        codes, ids = flexkernels.fsq_quantize(z.to(place[1]), levels)
        back = flexkernels.fsq_dequantize(ids, levels, dtype=dtype).cpu()
    expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z, levels)
    assert torch.equal(codes.cpu(), expected_codes) and torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(back, expected_codes)


@on_every_backend
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("levels", [PUBLISHED, [8] * 8, [5], [3, 4, 5], [2] * 16], ids=str)
def test_row_counts_and_alignment(place, levels, shift):
    move = unaligned if shift else lambda t: t
    for rows in (1, 31, 33, 64, 65, 127, 128, 129, 256, 257, 513):
        if interpreted(place) and rows > 129:
            continue
        for dtype, ids_dtype in ((torch.float32, torch.int64), (torch.float16, torch.int32)):
            z = (2 * torch.randn(rows, len(levels))).to(dtype)
            expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z, levels, ids_dtype=ids_dtype)
            with flexkernels.backend(place[0]):
                moved = move(z.to(place[1]))
                codes, ids = flexkernels.fsq_quantize(moved, levels, ids_dtype=ids_dtype)
                only_ids = flexkernels.fsq_quantize(moved, levels, codes=False, ids_dtype=ids_dtype)[1]
                only_codes = flexkernels.fsq_quantize(moved, levels, ids=False)[0]
                back = flexkernels.fsq_dequantize(move(ids), levels, dtype=dtype)
            for found in (codes, only_codes, back):
                assert torch.equal(found.cpu(), expected_codes), (rows, dtype)
            for found in (ids, only_ids):
                assert torch.equal(found.cpu(), expected_ids), (rows, dtype)


@on_every_backend
@pytest.mark.parametrize("levels", [[16] * 6, [16] * 6 + [2], [16] * 8, [255, 256, 256], [256] * 7], ids=str)
def test_ids_of_large_codebooks(place, levels):
    codebook = math.prod(levels)
    basis = fsq_math.basis(levels)
    ids = torch.tensor(
        sorted({min(max(m * step + s, 0), codebook - 1) for step in basis for m in (1, 2, 3) for s in (-1, 0, 1)})
    )
    ids = torch.cat([ids, torch.randint(codebook, (50,)), torch.tensor([0, codebook - 1])])
    expected = flexkernels.fsq_dequantize_ref(ids, levels)
    with flexkernels.backend(place[0]):
        codes = flexkernels.fsq_dequantize(ids.to(place[1]), levels).cpu()
        assert torch.equal(codes, expected)
        narrow = ids[ids < 2**16].to(torch.uint16)
        assert torch.equal(flexkernels.fsq_dequantize(narrow.to(place[1]), levels).cpu(), expected[ids < 2**16])
        # the middle of each level
        half, offset, shift = fsq_math.bound_terms(levels, expected)
        z = torch.atanh((expected * fsq_math.half_width(levels, expected) + offset) / half) - shift
        assert torch.equal(flexkernels.fsq_quantize(z.to(place[1]), levels)[1].cpu(), ids)


@on_every_backend
@every_dtype
@pytest.mark.parametrize("dims", [1, 4, 5, 6, 7, 8, 9, 16])
def test_embed_dimensions_and_packs(place, dims, dtype):
    skip_unrounded(place, dtype)
    levels = [3, 2, 5, 4, 3, 2, 4, 5, 2, 2, 3, 2, 2, 3, 2, 2][:dims]
    for rows, width, move in ((33, 40, lambda t: t), (33, 40, unaligned), (17, 37, lambda t: t)):
        ids = torch.randint(math.prod(levels), (rows,))
        given = {
            "weight": torch.randn(width, dims).to(dtype),
            "bias": torch.randn(width).to(dtype),
            "positions": torch.randn(rows, width).to(dtype),
            "tokens": torch.randn(2, width).to(dtype),
        }
        token_index = torch.randint(-3, 2, (rows,), dtype=torch.int32)
        with flexkernels.backend(place[0]):
            moved = {name: move(t.to(place[1])) for name, t in given.items()}
            out = flexkernels.fsq_embed(ids.to(place[1]), levels, **moved, token_index=token_index.to(place[1])).cpu()
            bare = flexkernels.fsq_embed(ids.to(place[1]), levels, moved["weight"]).cpu()
        exact = {name: t.double() for name, t in given.items()}
        expected = flexkernels.fsq_embed_ref(ids, levels, **exact, token_index=token_index)
        tolerance = dict(rtol=torch.finfo(dtype).eps, atol=2e-6)
        torch.testing.assert_close(out.double(), expected, **tolerance)
        torch.testing.assert_close(bare.double(), flexkernels.fsq_embed_ref(ids, levels, exact["weight"]), **tolerance)
        assert torch.equal(out[token_index >= 0], given["tokens"][token_index[token_index >= 0].long()])


@on_every_backend
@pytest.mark.parametrize("width", [4, 3])
def test_embed_walks_many_groups_of_rows(place, width):
    """More rows than all blocks of the emulator's small device take at once."""
    ids, weight = torch.randint(40, (2600,)), torch.randn(width, 2)
    with flexkernels.backend(place[0]):
        out = flexkernels.fsq_embed(ids.to(place[1]), [8, 5], weight.to(place[1])).cpu()
    torch.testing.assert_close(out, flexkernels.fsq_embed_ref(ids, [8, 5], weight), rtol=1e-6, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize(("width", "dims", "rows"), WIDTHS)
def test_project_widths(place, width, dims, rows):
    """Each width is some kernel's: z is that of float64 but for rounding, and far from zero too."""
    levels = [8] * dims
    for mean, tolerance in ((0.0, 1e-5), (1000.0, 5e-3)):
        hidden = torch.randn(rows, width) + mean
        weight, bias = torch.randn(dims, width) / width**0.5, torch.randn(dims)
        normed = torch.nn.functional.layer_norm(hidden.double(), (width,), eps=1e-5)
        z = normed @ weight.double().t() + bias
        low, high = (flexkernels.fsq_quantize_ref((z + e).float(), levels)[0] for e in (-tolerance, tolerance))
        with flexkernels.backend(place[0]):
            given = hidden.to(place[1]), weight.to(place[1]), bias.to(place[1])
            ids, codes = flexkernels.fsq_project_quantize(*given, levels, return_codes=True)
            moved = flexkernels.fsq_project_quantize(unaligned(given[0]), *given[1:], levels)
        assert ((codes.cpu() == low) | (codes.cpu() == high)).all()
        assert torch.equal(flexkernels.fsq_dequantize(ids.cpu(), levels), codes.cpu())
        # the place in memory changes no bit
        assert torch.equal(moved, ids)


@on_every_backend
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@every_dtype
def test_project_mixes_dtypes(place, dtype, weight_dtype):
    skip_unrounded(place, dtype)
    hidden, weight, bias = torch.randn(7, 64).to(dtype), torch.randn(6, 64) / 8, torch.randn(6)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
    z = torch.nn.functional.layer_norm(hidden.double(), (64,), eps=1e-5) @ weight.double().t() + bias.double()
    low, high = (flexkernels.fsq_quantize_ref((z + e).float(), PUBLISHED)[0].to(dtype) for e in (-1e-5, 1e-5))
    with flexkernels.backend(place[0]):
        given = (t.to(place[1]) for t in (hidden, weight, bias))
        _, codes = flexkernels.fsq_project_quantize(*given, PUBLISHED, return_codes=True)
    assert codes.dtype == dtype and ((codes.cpu() == low) | (codes.cpu() == high)).all()


@on_every_backend
@every_set
def test_train_level_sets(place, levels):
    """Choices are those of the specification for every codebook; rows of all kinds occur."""
    z = 2 * torch.randn(9, 13, len(levels))
    settings = dict(seed=-3, offset=2**40 + 1, drop_p=0.5, corrupt_p=0.6, min_corrupt_p=0.2, apply_p=0.8)
    with flexkernels.backend(place[0]):
        codes, ids = (t.cpu() for t in flexkernels.fsq_quantize_train(z.to(place[1]), levels, **settings))
    expected_codes, expected_ids = flexkernels.fsq_quantize_train_ref(z, levels, **settings)
    assert torch.equal(ids, expected_ids)
    rounded = expected_codes == flexkernels.fsq_dequantize_ref(expected_ids, levels)
    assert torch.equal(codes[rounded], expected_codes[rounded])
    assert rounded.any() and not rounded.all()
    torch.testing.assert_close(codes, expected_codes, rtol=0, atol=2**-20)
    assert not torch.equal(ids, flexkernels.fsq_quantize_ref(z, levels)[1])

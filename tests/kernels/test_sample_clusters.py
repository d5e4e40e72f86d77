"""`sample_logits` on CUDA: rows that the blocks of a cluster share draw the ids of the specification, bit by bit."""

import math

import emulator
import pytest
import torch
from helpers import emulated, on_cuda

import flexkernels

# one block a row, then clusters of 2, 4 and 8, whose last slices are short
VOCABULARIES = [1, 64, 1000, 4096, 4097, 9000, 17_001]
FILTERS = [
    {},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 1e-6, "min_p": 0.01},
    {"temperature": 0.7, "top_k": 300, "top_p": 0.5, "min_p": 1e-4},
]


def check(place, logits, uncond=None, **settings):
    settings["return_logprob"] = True
    expected = flexkernels.sample_logits_ref(logits, uncond_logits=uncond, **settings)
    with flexkernels.backend(place[0]):
        move = {k: v.to(place[1]) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        uncond = None if uncond is None else uncond.to(place[1])
        found = flexkernels.sample_logits(logits.to(place[1]), uncond_logits=uncond, **move)
    assert torch.equal(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=0, atol=0, equal_nan=True)


@on_cuda
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_number_of_blocks(place, vocab, filters):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[VOCABULARIES.index(vocab) % 3]
    logits, uncond = (3 * torch.randn(2, 1, vocab)).to(dtype)
    check(place, logits, seed=5, **filters)
    check(place, logits, uncond, guidance=1.7, seed=-3, offset=2**40, **filters)


@on_cuda
@pytest.mark.parametrize("vocab", [300, 4500])
def test_rows_of_one_value_or_none(place, vocab):
    """All equal, many ties, infinite, missing and hardly different values."""
    rows = torch.randn(9, vocab)
    rows[0] = -1.25
    rows[1] = rows[1].round()
    rows[2] = -math.inf
    rows[3] = math.nan
    rows[4] = -math.inf
    rows[4, vocab - 2] = -7.0
    rows[5, [vocab // 2, vocab - 1]] = math.inf
    rows[6, ::3], rows[6, 1::3] = torch.finfo(torch.float32).min, -math.inf
    rows[7] = 1 + torch.arange(vocab) * torch.finfo(torch.float32).eps
    rows[8] = torch.where(torch.rand(vocab) < 0.5, 0.0, -0.0)
    for settings in ({"top_k": 1}, {"top_k": vocab, "top_p": 0.3}, {"top_k": vocab - 1}, {"top_k": 17, "top_p": 0.6}):
        check(place, rows, seed=torch.arange(9), **settings)
    # guidance makes NaN of two infinities
    check(place, rows, rows.flip(1), guidance=2.0, top_k=5)


@on_cuda
def test_the_largest_vocabulary(place):
    logits = 2.5 * torch.randn(1, 2**18)
    check(place, logits, seed=1, offset=8, top_k=1000, top_p=0.95)


@on_cuda
def test_random_rows(place):
    """Scales from 1e-3 to 1e3, settings of every kind."""
    rows = 12 if emulated(place) else 1000
    for turn in range(10):
        vocab, scale = int(torch.randint(1, 200, ())), 10 ** (6 * torch.rand(rows, 1) - 3)
        logits, uncond = scale * torch.randn(2, rows, vocab)
        settings = {
            "temperature": float(torch.rand(())) * 2 + 0.01,
            "top_k": int(torch.randint(1, vocab + 1, ())) if turn % 2 else None,
            "top_p": float(torch.rand(())) * 0.99 + 0.005 if turn % 3 else 1.0,
            "min_p": float(torch.rand(())) * 0.1 if turn % 5 == 0 else 0.0,
        }
        check(place, logits, uncond if turn % 2 else None, guidance=1.5 if turn % 2 else 1.0, seed=turn, **settings)


@on_cuda
def test_every_schedule_draws_the_same(place):
    logits, uncond = 2 * torch.randn(2, 2, 8200)
    for seed in range(3):
        if emulated(place):
            emulator.load_ops().seed(seed)
        check(place, logits, uncond, guidance=3.0, top_k=50, top_p=0.9, seed=7)

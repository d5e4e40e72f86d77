"""Collapse: registers that are alike are one token, and nothing but the work changes."""

import copy

import pytest
import torch
from golden_tokenizer import CASES, load, samples

import vft
from vft.packing import Member, Packing, packing

T = 0.6


def close(got, want):
    for g, w in zip(got, want, strict=True):
        assert float((g - w).norm()) <= 1e-5 * float(w.norm())


@pytest.mark.parametrize("case", CASES)
def test_collapse_is_exact_for_every_keep(case):
    model, io, _ = load(case)
    x, ids = [io["noised_0"][0]], [io["tokens_0"][0]]
    for keep in range(model.registers + 1):
        for unconditional in (False, True):
            options = dict(keep=keep, unconditional=unconditional)
            got, want = (model.velocity(x, T, ids, **options, collapse=collapse) for collapse in (True, False))
            close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_collapse_is_exact_with_prefixes_and_ragged_batches(case):
    model, _, _ = load(case)
    shapes = [(16, 5, 8, 8), (16, 1, 4, 8), (16, 3, 6, 2), (16, 2, 4, 4)]
    latents = [torch.randn(shape) for shape in shapes]
    ids = model.encode_latents(latents)
    options = dict(keep=[16, 0, 3, 7], unconditional=[False, False, True, False], prefix_frames=[2, 1, 0, 0])
    got, want = (model.velocity(latents, T, ids, **options, collapse=collapse) for collapse in (True, False))
    close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_the_sampler_with_and_without_collapse(case):
    model, io, _ = load(case)
    ids, noise = samples(io, "tokens"), samples(io, "noise")
    prefix = [x[:, :1] for x in noise]

    def run(collapse):
        return model.decode_latents(ids, [4, 11], 4, vft.CFG(3.0), noise=noise, prefix=prefix, collapse=collapse)

    for got, want in zip(run(True), run(False), strict=True):
        assert float((got - want).norm()) <= 2e-5 * float(want.norm())


def tokens(case, keep, null=False, prefix=0, frames=5, patches=16):
    """Packed tokens of one sequence and, sorted, what its merged keys count."""
    model, _, _ = load(case)
    config = model.config
    grids, members = ((frames, 4, patches // 4),), (Member(0, keep, prefix, null),)
    made = packing(grids, members, config.registers, config.register_ops, config.decoder, True, torch.device("cpu"))
    weight = made.key_log_weight
    # what the layout promises of the weights
    listed, weights = (
        made.layout.tensors.weighted.flatten(),
        torch.zeros(made.layout.total) if weight is None else weight,
    )
    assert listed[listed < made.layout.total].tolist() == weights.nonzero()[:, 0].tolist()
    counts = [] if weight is None else sorted(weight.exp().round().int()[weight > 0].tolist())
    return made.layout.total, counts


def test_what_is_collapsed():
    patches = 5 * 16
    # keep 4 of 16: 4 registers and one that stands for 12, in each of 5 frames
    assert tokens("base", 4) == (patches + 5 * 5, [12] * 5)
    assert tokens("base", 16) == (patches + 5 * 16, [])
    assert tokens("base", 0) == (patches + 5, [16] * 5)
    assert tokens("base", 4, null=True) == (patches + 5, [16] * 5)
    assert tokens("base", 15) == (patches + 5 * 16, [])
    # two conditioning frames become one token each
    assert tokens("base", 4, prefix=2) == (patches + 2 + 3 * 5, [12] * 3 + [16] * 2)
    # where every frame sees every frame, one token serves them all
    assert tokens("fulldec", 4) == (patches + 5 * 4 + 1, [5 * 12])
    assert tokens("fulldec", 4, null=True) == (patches + 1, [5 * 16])
    # the mask token gets a position afterwards: no two registers are alike, but the null token still is
    assert tokens("early_drop", 4) == (patches + 5 * 16, [])
    assert tokens("early_drop", 4, null=True) == (patches + 5, [16] * 5)


def test_no_collapse_where_the_mask_tells_registers_apart():
    model, _, _ = load("base")
    trunk = model.config.encoder
    assert trunk.mask == "frame_causal_prefix"
    made = Packing(((5, 4, 4),), (Member(0, 4),), 16, model.config.register_ops, trunk, True, torch.device("cpu"))
    assert made.layout.total == 5 * 32 and made.key_log_weight is None


def test_collapse_has_the_same_gradients():
    model, io, _ = load("base")
    x, codes = samples(io, "noised"), torch.randn(sum(i.numel() for i in samples(io, "tokens")), 6)
    gradients = []
    for collapse in (True, False):
        decoder = copy.deepcopy(model.decoder).requires_grad_()
        out = decoder(x, torch.tensor([0.3, 0.8]), codes, [4, 11], [0, 1], [False, False], collapse)
        sum(v.square().sum() for v in out).backward()
        gradients.append([p.grad for p in decoder.parameters() if p.grad is not None])
    for got, want in zip(*gradients, strict=True):
        assert float((got - want).norm()) <= 2e-5 * float(want.norm()) + 1e-6

"""Muon: orthogonal steps, and which parameters get them."""

import math

import pytest
import torch
from torch import nn

from vft.config import make_config
from vft.train.optimizer import Muon, make, orthogonal
from vft.train.tokenizer import TokenizerSettings, train


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 40), (2, 40, 6), (1, 1, 5)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    x = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ orthogonal(x) @ vt.mT
    off_diagonal = values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))
    # the smallest singular values of a square matrix need more iterations than there are
    grown = values.diagonal(dim1=1, dim2=2)[s > 0.05 * s[:, :1]]
    assert off_diagonal.abs().max() < 1e-9
    assert grown.min() > 0.65 and grown.max() < 1.25


def test_a_matrix_without_a_gradient_stays_finite():
    assert not orthogonal(torch.zeros(1, 4, 4)).any()


def test_a_step_is_the_formula():
    start, grads = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(2)]
    p = nn.Parameter(start.clone())
    muon = Muon([p], lr=0.01, weight_decay=0.1, momentum=0.9)
    for grad in grads:
        p.grad = grad.clone()
        muon.step()
    momentum, expected = torch.zeros(6, 10), start
    for grad in grads:
        momentum = 0.9 * momentum + 0.1 * grad
        step = orthogonal((0.9 * momentum + 0.1 * grad)[None])[0]
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(10) * step
    torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_block_matrices_get_muon():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 5)]), "embed": nn.Linear(4, 3)})
    model["embed"].bias.requires_grad_(False)
    parameters = {f"encoder.{name}": p for name, p in model.named_parameters()}
    made = make(parameters, "muon", 0.1, 0.05, torch.float32)
    assert made.keys() == parameters.keys()
    assert [name for name, each in made.items() if isinstance(each, Muon)] == ["encoder.blocks.0.weight"]
    decays = {id(p): group["weight_decay"] for each in set(made.values()) for group in each.param_groups
              for p in group["params"]}  # fmt: skip
    expected = {"blocks.0.weight": 0.05, "embed.weight": 0.05, "blocks.0.bias": 0.0}
    assert {name: decays[id(parameters[f"encoder.{name}"])] for name in expected} == expected
    assert len(decays) == len(expected)
    assert len(set(make(parameters, "adamw", 0.1, 0.05, torch.float32).values())) == 1


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="must be matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optimizer must be one of muon, adamw, got 'sgd'"):
        train(tmp_path, TokenizerSettings(optimizer="sgd"), config=make_config())

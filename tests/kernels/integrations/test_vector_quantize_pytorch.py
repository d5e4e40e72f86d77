import copy
import itertools
import logging
import pickle

import pytest
import torch
from torch import nn

import flexkernels
from flexkernels import library
from flexkernels.integrations.vector_quantize_pytorch import _exact

vq = pytest.importorskip("vector_quantize_pytorch")

LEVELS = [8, 5, 5, 3]


def pair(*args, **settings):
    """An FSQ and an accelerated copy of it."""
    original = vq.FSQ(*args, **settings)
    return original, flexkernels.accelerate(copy.deepcopy(original))


def draw(*shape, dtype=torch.float32):
    return (1.5 * torch.randn(shape)).to(dtype)


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif expected is not None:
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(got, expected)


VARIANTS = [
    dict(),
    dict(preserve_symmetry=True),
    dict(bound_hard_clamp=True),
    dict(preserve_symmetry=True, bound_hard_clamp=True),
    dict(preserve_symmetry=True, noise_dropout=0.5),
    dict(return_indices=False),
    dict(keep_num_codebooks_dim=True),
    dict(num_codebooks=3),
    dict(num_codebooks=2, dim=10, preserve_symmetry=True),
    dict(dim=7, projection_has_bias=False),
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("channel_first", [False, True])
def test_same_outputs_in_every_layout(settings, channel_first):
    original, ours = pair(LEVELS, channel_first=channel_first, **settings)
    shapes = [(2, original.dim, 3, 5), (1, original.dim, 2, 3, 4)]
    shapes += [(2, original.dim, 9), (2, original.dim)] if channel_first else [(2, 9, original.dim)]
    for shape in shapes:
        z = draw(*shape)
        expected = original.eval()(z)
        assert_same(ours.eval()(z), expected)
        if settings.get("return_indices", True) and len(shape) > 2:
            assert_same(ours.indices_to_codes(expected[1]), original.indices_to_codes(expected[1]))


PRECISIONS = [
    dict(),
    dict(preserve_symmetry=True),
    dict(force_quantization_f32=False),
    dict(force_quantization_f32=False, preserve_symmetry=True),
    dict(allowed_dtypes=(torch.bfloat16, torch.float16)),
    dict(allowed_dtypes=(torch.bfloat16, torch.float16), preserve_symmetry=True),
]


@pytest.mark.parametrize("settings", PRECISIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_same_dtypes_and_gradients(settings, dtype):
    original, ours = pair(LEVELS, **settings)
    z = draw(2, 400, 4, dtype=dtype)
    grad = torch.randn(z.shape).to(dtype)
    results = []
    for fsq in (original, ours):
        leaf = z.clone().requires_grad_()
        codes, indices = fsq(leaf)
        codes.backward(grad)
        results.append((codes.detach(), indices, leaf.grad))
    (*expected, expected_grad), (*got, got_grad) = results
    assert_same(tuple(got), tuple(expected))
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got_grad, expected_grad, rtol=4 * eps, atol=eps)


def test_training_with_projections_and_noise_is_the_original_training():
    original, ours = pair(LEVELS, dim=6, num_codebooks=2, preserve_symmetry=True, noise_dropout=0.5)
    z, grad = draw(2, 50, 6), torch.randn(2, 50, 6)
    for fsq in (original, ours):
        torch.manual_seed(7)
        fsq.train()(z)[0].backward(grad)
    torch.manual_seed(7)
    expected = original(z)
    torch.manual_seed(7)
    assert_same(ours(z), expected)
    for one, other in zip(ours.parameters(), original.parameters(), strict=True):
        assert other.grad.abs().sum() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_rotation():
    original, ours = pair([5] * 4, orthogonal_rotation=True)
    z = draw(2, 100, 4)
    assert_same(ours(z), original(z))


@pytest.mark.parametrize("levels", [[8, 8, 8, 5, 5, 5], [256, 255], [3] * 10, [2, 64, 65]], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_index_of_codebooks_that_are_called_exact(levels, symmetric):
    assert _exact(tuple(levels))
    if 2 in levels and not symmetric:
        pytest.skip("the package wants symmetry for two levels")
    original, ours = pair(levels, preserve_symmetry=symmetric)
    ids = torch.arange(original.codebook_size).view(1, -1)
    codes = ours.indices_to_codes(ids)
    assert_same(codes, original.indices_to_codes(ids))
    assert torch.equal(original.codes_to_indices(codes), ids.int())


def test_large_codebooks_keep_the_original_sum():
    levels = [64, 64, 64, 63, 9]
    assert not _exact(tuple(levels))
    original, ours = (vq.FSQ(levels, return_indices=False) for _ in range(2))
    original.return_indices = ours.return_indices = True
    flexkernels.accelerate(ours)
    for dtype in (torch.float32, torch.bfloat16):
        z = draw(1, 5000, 5, dtype=dtype)
        assert_same(ours(z), original(z))


def test_indices_outside_wrap_around_as_before():
    original, ours = pair(LEVELS)
    ids = torch.tensor([[-1, 600, 601, 0]])
    assert_same(ours.indices_to_codes(ids), original.indices_to_codes(ids))


@pytest.mark.parametrize("clamp", [False, True])
def test_residual_fsq_inside_a_module(clamp):
    original = nn.Sequential(
        nn.Linear(6, 4), vq.ResidualFSQ(levels=[8, 5, 5, 3], num_quantizers=3, bound_hard_clamp=clamp)
    )
    ours = flexkernels.accelerate(copy.deepcopy(original))
    assert all("forward" in vars(layer) for layer in ours[1].layers)
    x = torch.randn(2, 200, 6)
    assert_same(ours(x), original(x))
    assert_same(ours[1](original[0](x), return_all_codes=True), original[1](original[0](x), return_all_codes=True))


def test_restore_gives_the_original_back():
    fsq = vq.FSQ(LEVELS, dim=6)
    before, z = dict(vars(fsq)), draw(2, 9, 6)
    expected = fsq(z)
    assert flexkernels.accelerate(fsq) is fsq and flexkernels.accelerate(fsq) is fsq
    changed = flexkernels.accelerate(nn.ModuleList([fsq, fsq]))
    assert_same(fsq(z), expected)
    flexkernels.restore(changed)
    assert "forward" in vars(fsq)
    flexkernels.restore(fsq)
    assert vars(fsq).keys() == before.keys() and fsq.forward.__func__ is vq.FSQ.forward
    assert_same(fsq(z), expected)
    with pytest.raises(ValueError, match="must have been given to accelerate before, got an unchanged FSQ"):
        flexkernels.restore(fsq)


def test_really_runs_the_kernel(monkeypatch):
    _, ours = pair(LEVELS)
    calls, run = [], library.Op.__call__
    monkeypatch.setattr(library.Op, "__call__", lambda op, *args: calls.append(op.name) or run(op, *args))
    ours(draw(1, 2, 4))
    ours.indices_to_codes(torch.zeros(1, 2, dtype=torch.int64))
    assert calls == ["fsq_quantize", "fsq_dequantize"]


def test_changed_formulas_and_foreign_levels_are_left(caplog):
    class Mine(vq.FSQ):
        def bound(self, z, eps=1e-3, hard_clamp=False):
            return super().bound(2 * z, eps, hard_clamp)

    many = vq.FSQ([3] * 17, return_indices=False)
    for fsq, reason in ((Mine(LEVELS), "bound is not the package's own"), (many, "more than 16 levels")):
        with caplog.at_level(logging.INFO, "flexkernels"):
            flexkernels.accelerate(fsq)
        assert "forward" not in vars(fsq) and f"replaced nothing; left {type(fsq).__name__} ({reason}" in caplog.text
        flexkernels.restore(fsq)


def test_log_and_errors(caplog):
    with caplog.at_level(logging.INFO, "flexkernels"):
        flexkernels.accelerate(nn.ModuleDict({"quantizer": vq.FSQ(LEVELS, preserve_symmetry=True)}))
    assert "quantizer: replaced FSQ.forward, FSQ.indices_to_codes; left float64 inputs, low precision" in caplog.text
    with pytest.raises(TypeError, match="options of vector_quantize_pytorch must be among none, got level"):
        flexkernels.accelerate(vq.FSQ(LEVELS), level=2)
    with pytest.raises(TypeError, match=r"found nothing known in torch\.nn\.modules\.linear\.Linear"):
        flexkernels.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="z must have 4 features, got 5"):
        flexkernels.accelerate(vq.FSQ(LEVELS))(torch.randn(1, 2, 5))


def test_empty_and_copies_and_state_dict():
    original, ours = pair(LEVELS, dim=6)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.project_in.weight.zero_()
    z = draw(2, 3, 6)
    assert_same(ours(z), original(z))
    assert twin(z)[1].unique().numel() == 1
    assert_same(pickle.loads(pickle.dumps(ours))(z), original(z))
    assert list(ours.state_dict()) == list(original.state_dict())
    assert_same(ours(z[:, :0]), original(z[:, :0]))


@pytest.mark.parametrize("symmetric, image", list(itertools.product([False, True], repeat=2)))
def test_traces_without_a_break(symmetric, image):
    original, ours = pair(LEVELS, preserve_symmetry=symmetric)
    z = draw(2, 4, 3, 5) if image else draw(2, 9, 4)
    assert_same(torch.compile(ours, fullgraph=True, backend="eager")(z), original(z))

"""FSQ with quantisation dropout and token corruption."""

import pytest
import torch
from helpers import DEVICE, FLOATS, inductor, interpreted, needs_gpu, on_every_backend
from torch._dynamo.testing import CompileCounterWithBackend

import flexkernels
from flexkernels import fsq_math

PUBLISHED = [8, 8, 8, 5, 5, 5]
train, train_ref = flexkernels.fsq_quantize_train, flexkernels.fsq_quantize_train_ref


def draw(*shape, dtype=torch.float32):
    return (2 * torch.randn(*shape, 6)).to(dtype)


def smooth(z):
    half_width = torch.tensor([level // 2 for level in PUBLISHED], device=z.device)
    return (fsq_math.bound(z.float(), tuple(PUBLISHED)) / half_width).to(z.dtype)


def test_without_noise_it_is_fsq_quantize():
    z = draw(3, 5)
    for found, expected in zip(train(z, PUBLISHED, seed=0), flexkernels.fsq_quantize(z, PUBLISHED), strict=True):
        assert torch.equal(found, expected)


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_makes_the_same_choices(place, dtype):
    if interpreted(place) and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not round bfloat16")
    z = draw(64, 9, dtype=dtype)
    settings = dict(seed=5, offset=2**33, drop_p=0.4, corrupt_p=0.5, min_corrupt_p=0.1, apply_p=0.6)
    with flexkernels.backend(place[0]):
        codes, ids = train(z.to(place[1]), PUBLISHED, **settings, ids_dtype=torch.uint16)
    expected_codes, expected_ids = train_ref(z, PUBLISHED, **settings, ids_dtype=torch.uint16)
    assert ids.dtype == torch.uint16 and torch.equal(ids.cpu(), expected_ids)
    # a CUDA kernel has a tanh of its own, in the emulator too
    foreign = "cuda" in place
    torch.testing.assert_close(codes.cpu(), expected_codes, rtol=1e-6, atol=1e-6 if foreign else 0)


def test_dropout_leaves_whole_samples_unrounded():
    z = draw(20_000, 3)
    codes, ids = train(z, PUBLISHED, seed=1, drop_p=0.3)
    rounded, expected_ids = flexkernels.fsq_quantize(z, PUBLISHED)
    dropped = (codes != rounded).flatten(1).any(1)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(codes[dropped], smooth(z)[dropped])
    # five standard deviations of the binomial distribution
    assert abs(float(dropped.double().mean()) - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    every, _ = train(z, PUBLISHED, seed=1, drop_p=1.0)
    assert torch.equal(every, smooth(z))


def test_corruption_replaces_tokens_by_uniform_ids():
    z = draw(1000, 400)
    codes, ids = train(z, PUBLISHED, seed=2, corrupt_p=0.5, min_corrupt_p=0.2, apply_p=0.7)
    _, clean = flexkernels.fsq_quantize(z, PUBLISHED)
    assert torch.equal(codes, flexkernels.fsq_dequantize(ids, PUBLISHED))
    hit = ids != clean
    share = hit.double().mean(1)
    touched = share > 0
    assert abs(float(touched.double().mean()) - 0.7) < 5 * (0.7 * 0.3 / 1000) ** 0.5
    # rates are uniform in [0.2, 0.5], and 400 tokens tell one within 0.13
    assert 0.07 < share[touched].min() < 0.25 and 0.45 < share[touched].max() < 0.63
    assert abs(float(share[touched].mean()) - 0.35) < 0.02
    counts = torch.bincount(ids[hit] // 1000, minlength=64).double()
    even = counts.mean()
    assert ((counts - even).square() / even).sum() < 63 + 5 * (2 * 63) ** 0.5
    all_hit = train(z, PUBLISHED, seed=2, corrupt_p=1.0)[1]
    assert float((all_hit != clean).double().mean()) > 0.999


def test_seeds_and_offsets_draw_anew_and_repeat():
    z = draw(8, 100)
    first = train(z, PUBLISHED, seed=3, offset=1, drop_p=0.5, corrupt_p=0.5)
    again = train(z, PUBLISHED, seed=torch.tensor(3), offset=torch.tensor(1), drop_p=0.5, corrupt_p=0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for settings in ({"seed": 4, "offset": 1}, {"seed": 3, "offset": 2}, {"seed": 3, "offset": 1 + 2**32}):
        assert not torch.equal(first[1], train(z, PUBLISHED, **settings, drop_p=0.5, corrupt_p=0.5)[1])


def test_packed_samples_are_those_of_a_batch():
    z = draw(6, 50)
    settings = dict(seed=7, drop_p=0.5, corrupt_p=0.4, apply_p=0.5)
    batch = train(z, PUBLISHED, **settings)
    sample = torch.arange(6, dtype=torch.int32).repeat_interleave(50)
    packed = train(z.flatten(0, 1), PUBLISHED, sample=sample, **settings)
    for found, expected in zip(packed, batch, strict=True):
        assert torch.equal(found, expected.flatten(0, 1))


def test_gradient_is_straight_through_and_zero_where_replaced():
    z = draw(200, 3).requires_grad_()
    codes, ids = train(z, PUBLISHED, seed=8, drop_p=0.5, corrupt_p=0.3)
    assert codes.requires_grad and not ids.requires_grad
    weight = torch.randn_like(codes)
    codes.backward(weight)
    (expected,) = torch.autograd.grad(smooth(other := z.detach().requires_grad_()), other, weight)
    kept = ids == flexkernels.fsq_quantize(z, PUBLISHED)[1]
    assert 0.6 < float(kept.double().mean()) < 0.8
    torch.testing.assert_close(z.grad, expected * kept.unsqueeze(-1), rtol=1e-5, atol=1e-6)


def test_forward_mode_and_second_derivative():
    z, tangent, grad = draw(40, 3), torch.randn(40, 3, 6), torch.randn(40, 3, 6)
    settings = dict(seed=8, drop_p=0.5, corrupt_p=0.3)
    run = lambda z: train(z, PUBLISHED, **settings)[0]  # noqa: E731
    codes, forward = torch.func.jvp(run, (z,), (tangent,))
    assert torch.equal(codes, run(z))
    leaf = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(leaf), leaf, grad, create_graph=True)
    torch.testing.assert_close((first.detach() * tangent).sum(), (grad * forward).sum(), rtol=1e-4, atol=1e-4)
    # tokens that were replaced have no slope at all
    replaced = train(z, PUBLISHED, **settings)[1] != flexkernels.fsq_quantize(z, PUBLISHED)[1]
    assert replaced.any() and (forward[replaced] == 0).all() and (forward[~replaced] != 0).any()
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert (second[replaced] == 0).all() and second.abs().max() > 0


def test_repeats_bit_by_bit():
    z = draw(30, 20)
    first, again = (train(z, PUBLISHED, seed=3, drop_p=0.5, corrupt_p=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # on the CPU the specification's bits
    for found, expected in zip(first, train_ref(z, PUBLISHED, seed=3, drop_p=0.5, corrupt_p=0.3), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("corrupt_p", [0.0, 0.4])
def test_opcheck(corrupt_p):
    z = draw(4, 5).to(DEVICE).requires_grad_()
    counter, sample = torch.tensor(3, device=DEVICE), torch.zeros(4, 5, dtype=torch.int32, device=DEVICE)
    chances = 0.5, corrupt_p, corrupt_p / 2, 0.8
    for given in ((1, None, 2, None, None), (0, counter, 0, counter, sample)):
        torch.library.opcheck(
            torch.ops.flexkernels.fsq_quantize_train.default, (z, PUBLISHED, *given, *chances, torch.int32)
        )


def test_new_seeds_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train, fullgraph=True, backend=counter)
    z = draw(4, 5)
    for seed in range(7, 12):
        assert torch.equal(
            compiled(z, PUBLISHED, seed=seed, corrupt_p=0.5)[1], train(z, PUBLISHED, seed=seed, corrupt_p=0.5)[1]
        )
    # once with the number as a constant, once with any
    assert counter.frame_count <= 2


def test_empty_batches():
    for shape in ((0, 4), (4, 0)):
        codes, ids = train(draw(*shape), PUBLISHED, seed=0, drop_p=0.5, corrupt_p=0.5)
        assert codes.shape == (*shape, 6) and ids.shape == shape


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compiles_to_one_graph(compiler):
    z, seed = draw(5, 7).to(DEVICE), torch.tensor(3, device=DEVICE)
    settings = dict(drop_p=0.5, corrupt_p=0.5, apply_p=0.8)
    compiled = torch.compile(train, fullgraph=True, backend=compiler)
    for found, expected in zip(
        compiled(z, PUBLISHED, seed=seed, **settings), train(z, PUBLISHED, seed=seed, **settings), strict=True
    ):
        torch.testing.assert_close(found, expected)


@needs_gpu
def test_cuda_graph_replays():
    z, offset = draw(50, 40).cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    run = lambda: train(z, PUBLISHED, seed=1, offset=offset, drop_p=0.5, corrupt_p=0.5)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, ids = run()
    offset.fill_(9)
    graph.replay()
    expected_codes, expected_ids = run()
    assert torch.equal(codes, expected_codes) and torch.equal(ids, expected_ids)


Z = torch.zeros(2, 3, 6)
WRONG = [
    ({"drop_p": 1.5}, ValueError, "drop_p must be at most 1, got 1.5"),
    ({"corrupt_p": -0.1}, ValueError, "corrupt_p must be at least 0, got -0.1"),
    ({"apply_p": "1"}, TypeError, "apply_p must be a number, got str"),
    ({"corrupt_p": 0.2, "min_corrupt_p": 0.3}, ValueError, "min_corrupt_p must be at most corrupt_p, 0.2, got 0.3"),
    ({"seed": 1.0}, TypeError, "seed must be an int or an int64 tensor, got float"),
    ({"seed": True}, TypeError, "seed must be an int or an int64 tensor, got bool"),
    ({"drop_p": torch.tensor(0.5)}, TypeError, "drop_p must be a number, got Tensor"),
    ({"drop_p": True}, TypeError, "drop_p must be a number, got bool"),
    ({"drop_p": float("nan")}, ValueError, "drop_p must be finite, got nan"),
    ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
    ({"offset": torch.zeros(2, dtype=torch.int64)}, ValueError, "offset must have 0 dimensions"),
    ({"sample": torch.zeros(2)}, TypeError, "sample must be int64 or int32, got float32"),
    ({"sample": torch.zeros(2, dtype=torch.int64)}, ValueError, r"sample must have the shape \[2, 3\], got \[2\]"),
    ({"z": torch.zeros(6)}, ValueError, r"z must have a dimension of samples or tokens before the last"),
    ({"z": Z.double()}, TypeError, "z must be float32 or bfloat16 or float16, got float64"),
    ({"ids_dtype": torch.int16}, TypeError, "ids_dtype must be int64 or int32 or uint16"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    arguments = {"z": Z, "levels": PUBLISHED, "seed": 0} | change
    for function in (train, train_ref):
        with pytest.raises(error, match=message):
            function(
                arguments["z"], arguments["levels"], **{k: v for k, v in arguments.items() if k not in ("z", "levels")}
            )

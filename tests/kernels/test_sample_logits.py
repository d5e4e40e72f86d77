import math

import pytest
import torch
from helpers import DEVICE, FLOATS, emulated, inductor, interpreted, needs_gpu, on_every_backend, on_every_machine
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import sampling_math

op = torch.ops.flexkernels
FILTERS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "argmax": {"temperature": 0.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}
every_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)


def skip_in_the_interpreter(place, unless=False):
    """Its draws are compared with the reference's elsewhere, and it is slow."""
    if interpreted(place) and not unless:
        pytest.skip("slow in the interpreter")


def sample(place, logits, **settings):
    with flexkernels.backend(place[0]):
        move = {k: v.to(place[1]) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        result = flexkernels.sample_logits(logits.to(place[1]), **move)
    return tuple(value.cpu() for value in result) if isinstance(result, tuple) else result.cpu()


def formula(logits, uncond=None, guidance=1.0, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution in float64, by sorting: probabilities [n, vocab]."""
    x = logits.double()
    if uncond is not None:
        x = uncond.double() + guidance * (x - uncond.double())
    x = x / temperature
    if top_k is not None:
        x = x.masked_fill(x < x.topk(min(top_k, x.shape[1])).values[:, -1:], -math.inf)
    p = x.softmax(1)
    if top_p is not None:
        # the mass of larger logits, the same for equal ones
        larger = (x[:, None, :] > x[:, :, None]) if x.shape[1] <= 2000 else None
        if larger is not None:
            above = (larger * p[:, None, :]).sum(2)
        else:
            ordered, order = p.sort(1, descending=True)
            above = torch.empty_like(p).scatter_(1, order, ordered.cumsum(1) - ordered)
        p = p.masked_fill(above >= top_p, 0)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(1, keepdim=True), 0)
    return p / p.sum(1, keepdim=True)


# the distribution


@every_filter
def test_draws_follow_the_distribution(filters):
    """A chi-square test on 1,000,000 draws; every token kept by the formula, and no other, is drawn."""
    if filters == FILTERS["argmax"]:
        pytest.skip("nothing is drawn")
    rows, draws, turns = 5, 40_000, 5
    logits, uncond = 1.2 * torch.randn(2, rows, 50)
    expected = formula(logits, uncond, 1.4, **filters)
    many = [x.repeat_interleave(draws, 0) for x in (logits, uncond)]
    counts = torch.zeros(rows, 50, dtype=torch.float64)
    for offset in range(turns):
        ids = flexkernels.sample_logits(many[0], uncond_logits=many[1], guidance=1.4, seed=11, offset=offset, **filters)
        counts.scatter_add_(1, ids.view(rows, draws), torch.ones(rows, draws, dtype=torch.float64))
    draws *= turns
    assert not counts[expected == 0].any()
    kept = expected > 1e-3
    assert (counts[kept] > 0).all()
    statistic = ((counts - draws * expected).square() / (draws * expected))[kept].sum()
    freedom = int(kept.sum()) - rows
    # five standard deviations of the chi-square distribution
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_offsets_and_seeds_draw_independently():
    """Pairs of draws at neighbouring offsets, seeds and rows: all 16 pairs of 4 equal tokens are equally frequent."""
    n = 40_000
    logits = torch.zeros(n, 4)
    numbers = torch.arange(n)
    first = flexkernels.sample_logits(logits, seed=numbers, offset=0)
    for settings in ({"seed": numbers, "offset": 1}, {"seed": numbers + n, "offset": 0}, {"seed": 5}, {"seed": 6}):
        second = flexkernels.sample_logits(logits, **settings)
        counts = torch.bincount(4 * first + second, minlength=16).double()
        assert ((counts - n / 16).square() / (n / 16)).sum() < 15 + 5 * math.sqrt(30)
    # an int seed gives the rows streams of their own
    assert torch.bincount(flexkernels.sample_logits(logits, seed=5), minlength=4).min() > 0.24 * n


def test_the_whole_vocabulary_is_reached_evenly():
    """262,144 equal tokens in 16 groups: the index has no pattern."""
    ids = torch.cat([flexkernels.sample_logits(torch.zeros(20, 2**18), seed=seed) for seed in range(20)])
    for groups in (ids // 2**14, ids % 16, ids // 16 % 4):
        counts = torch.bincount(groups, minlength=int(groups.max()) + 1).double()
        even = ids.numel() / len(counts)
        assert ((counts - even).square() / even).sum() < len(counts) + 5 * math.sqrt(2 * len(counts))


def test_philox_known_answers():
    """Random123's known answers for Philox-4x32-10."""
    for word, seed, expected in (
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, 0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        counter = [torch.tensor(word) for _ in range(4)]
        found = sampling_math.philox(torch.tensor(seed), torch.tensor(seed), counter)
        assert [int(value) for value in found] == expected


def test_functions_are_accurate():
    y = -torch.rand(100_000) * 60
    assert (sampling_math.exp2(y).double() / torch.exp2(y.double()) - 1).abs().max() < 1.3e-7
    assert sampling_math.exp2(torch.tensor([0.0, -126.0, -126.5, -math.inf])).tolist() == [1.0, 2.0**-126, 0.0, 0.0]
    bits = torch.cat([torch.arange(1000), torch.randint(2**31 - 1, (100_000,)), 2**31 - 1 - torch.arange(1000)])
    u = (bits.double() + 0.5) / 2**31
    error = sampling_math.exponential(bits.int()).double() / -torch.log1p(-u) - 1
    assert error.abs().max() < 3e-7


# the same draws everywhere


def check(place, logits, **settings):
    found = sample(place, logits, **settings, return_logprob=True)
    expected = flexkernels.sample_logits_ref(logits, **settings, return_logprob=True)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)
    if not interpreted(place):
        assert torch.equal(sample(place, logits, **settings), expected[0])
    return expected


@on_every_backend
@every_filter
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_draws_the_same(place, filters, dtype):
    skip_in_the_interpreter(place, dtype == torch.float32 or filters == FILTERS["all"])
    if emulated(place) and dtype != torch.bfloat16:
        pytest.skip("one dtype is enough for the emulator")
    for vocab in (151,) if interpreted(place) else (1, 151) if emulated(place) else (1, 17, 64, 151, 1000):
        logits, uncond = (3 * torch.randn(2, 1 if interpreted(place) else 3, vocab)).to(dtype)
        if not interpreted(place):
            check(place, logits, **filters, seed=3, offset=9)
        check(place, logits, uncond_logits=uncond, guidance=2.5, seed=-1, offset=2**40, **filters)


@on_every_machine
@every_filter
def test_many_rows_draw_the_same(place, filters):
    skip_in_the_interpreter(place, filters == FILTERS["all"])
    rows = 4 if interpreted(place) else 4000
    logits = 2 * torch.randn(rows, 70)
    check(place, logits, **filters, seed=2**50 + 1, offset=torch.arange(rows))


@on_every_machine
@pytest.mark.parametrize("filters", [{}, {"top_k": 100, "top_p": 0.95}, {"top_p": 0.9}, {"top_k": 30_000}])
def test_large_vocabularies(place, filters):
    skip_in_the_interpreter(place, not filters)
    for vocab in (64_000,) if interpreted(place) else (64_000, 2**18):
        check(place, 2.5 * torch.randn(1, vocab), **filters, seed=4)


@on_every_machine
def test_rows_do_not_depend_on_their_place(place):
    logits, seeds, offsets = torch.randn(6, 100), torch.arange(6) - 3, torch.arange(6) * 2**33
    ids = sample(place, logits, seed=seeds, offset=offsets)
    for r in range(6):
        one = sample(place, logits[r : r + 1], seed=seeds[r : r + 1], offset=offsets[r : r + 1])
        assert torch.equal(one, ids[r : r + 1])
    # a row's offset may as well be an int; an int seed draws row 0 as that seed does
    assert torch.equal(sample(place, logits[2:3], seed=-1, offset=2**34), ids[2:3])
    assert torch.equal(sample(place, logits, seed=seeds, offset=offsets), ids)


# what is kept


@on_every_machine
@every_filter
@pytest.mark.parametrize("vocab", [2, 17, 300])
def test_logprob_is_that_of_the_formula(place, filters, vocab):
    if filters == FILTERS["argmax"]:
        pytest.skip("its log-probability is 0")
    skip_in_the_interpreter(place)
    logits, uncond = 2 * torch.randn(2, 8, vocab)
    ids, logprob = sample(place, logits, uncond_logits=uncond, guidance=1.7, return_logprob=True, **filters)
    expected = formula(logits, uncond, 1.7, **filters).gather(1, ids[:, None])[:, 0].log()
    torch.testing.assert_close(logprob.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("filters", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 5000, "top_p": 0.7, "min_p": 1e-3}])
def test_logprob_of_a_large_vocabulary(filters):
    logits = 3 * torch.randn(8, 64_000)
    ids, logprob = flexkernels.sample_logits(logits, return_logprob=True, **filters)
    expected = formula(logits, **filters).gather(1, ids[:, None])[:, 0].log()
    torch.testing.assert_close(logprob.double(), expected, rtol=2e-6, atol=2e-6)


def kept_tokens(place, logits, **settings):
    """Which tokens of one row are ever drawn in many rows; few in the interpreter, whose draws are the reference's."""
    rows = 2000
    if interpreted(place):
        check(place, logits, seed=1, **settings)
        place = "reference", place[1]
    return set(sample(place, logits.expand(rows, -1), **settings).tolist())


@on_every_machine
def test_ties_stay_or_go_together(place):
    logits = torch.tensor([[1.0, 2.0, 0.0, 1.0, -0.0, 1.0]])
    assert kept_tokens(place, logits, top_k=1) == {1}
    assert kept_tokens(place, logits, top_k=2) == kept_tokens(place, logits, top_k=4) == {0, 1, 3, 5}
    # -0 is 0
    assert kept_tokens(place, logits, top_k=5, temperature=4.0) == {0, 1, 2, 3, 4, 5}
    # token 1 holds 0.42 of the mass, those at 1.0 up to 0.89
    assert kept_tokens(place, logits, top_p=0.4) == {1}
    assert kept_tokens(place, logits, top_p=0.43) == kept_tokens(place, logits, top_p=0.88) == {0, 1, 3, 5}
    assert kept_tokens(place, logits, min_p=0.36) == {0, 1, 3, 5}
    assert kept_tokens(place, logits, min_p=0.37) == {1}


@on_every_machine
@pytest.mark.parametrize("filters", [{"top_k": 150}, {"top_p": 0.999}], ids=str)
def test_zero_in_the_middle_of_ties(place, filters):
    """Thirty of each of -3 .. 3: half way between the least and the largest lie values, which count once."""
    check(place, torch.arange(-3.0, 4.0).repeat(30)[None], seed=3, **filters)


@on_every_machine
def test_the_token_that_crosses_top_p_stays(place):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log2() * math.log(2)
    for top_p, expected in ((1e-9, {0}), (0.49, {0}), (0.51, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2, 3})):
        assert kept_tokens(place, logits, top_p=top_p) == expected
    # top-p counts the mass of what top-k left
    assert kept_tokens(place, logits, top_k=2, top_p=0.66) == {0}
    assert kept_tokens(place, logits, top_k=2, top_p=0.68) == {0, 1}


@on_every_machine
def test_argmax_takes_the_lowest_index(place):
    logits = torch.zeros(3, 100)
    logits[0, [70, 30]] = 1.0
    logits[1, 99] = 0.5
    ids, logprob = sample(place, logits, temperature=0, return_logprob=True, seed=8)
    assert ids.tolist() == [30, 99, 0] and logprob.tolist() == [0, 0, 0]


@on_every_machine
@every_filter
def test_infinite_and_missing_logits(place, filters):
    skip_in_the_interpreter(place, filters in (FILTERS["argmax"], FILTERS["all"]))
    logits = torch.randn(6, 130)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, 1:] = -math.inf
    logits[3, 5] = math.nan
    logits[4, [7, 9]] = math.inf
    logits[5, ::2] = torch.finfo(torch.float32).min
    ids, logprob = check(place, logits, **filters)
    assert ids[:2].tolist() == [0, 0] and logprob[:2].isnan().all()
    assert ids[2] == 0 and logprob[2] == 0 and ids[3] != 5 and ids[4] in (7, 9)
    assert ids[5] % 2 == 1
    # guidance makes NaN of two infinities
    skip_in_the_interpreter(place)
    check(place, logits, uncond_logits=logits.flip(1), guidance=3.0, **filters)


@on_every_machine
def test_outliers_and_extreme_temperatures(place):
    logits = torch.randn(2, 500) * torch.logspace(-30, 30, 500)
    for settings in ({"top_k": 40}, {"top_p": 0.5}, {"temperature": 1e-40}, {"temperature": 1e30, "top_k": 499}):
        check(place, logits, **settings)


@on_every_machine
def test_empty_and_strided_inputs(place):
    ids, logprob = sample(place, torch.empty(0, 50), return_logprob=True, top_k=3)
    assert ids.shape == logprob.shape == (0,) and ids.dtype == torch.int64
    wide = torch.randn(2, 2, 90)
    for logits in (wide[:, 1], wide[:, 0, ::2], torch.randn(70, 2).t()):
        settings = {"min_p": 0.2, "seed": torch.arange(2 * len(logits))[::2]}
        expected = sample(place, logits.contiguous(), **settings)
        with flexkernels.backend(place[0]):
            settings["seed"] = settings["seed"].to(place[1])
            assert torch.equal(flexkernels.sample_logits(logits.to(place[1]), **settings).cpu(), expected)


# dispatch, tracing


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full):
    logits, numbers = torch.randn(3, 40, device=DEVICE), torch.arange(3, device=DEVICE)
    rest = (
        (logits, 1.5, 0.7, 5, 0.9, 0.1, 0, numbers, 0, numbers)
        if full
        else (None, 1.0, 1.0, 2**18, 1.0, 0.0, 1, None, 2, None)
    )
    torch.library.opcheck(op.sample_logits.default, (logits, *rest, full))


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compiles_to_one_graph(compiler):
    compiled = torch.compile(flexkernels.sample_logits, fullgraph=True, backend=compiler)
    logits = torch.randn(3, 40, device=DEVICE)
    for offset in range(3):
        settings = {"top_k": 9, "top_p": 0.9, "offset": offset, "return_logprob": True}
        for found, expected in zip(
            compiled(logits, **settings), flexkernels.sample_logits(logits, **settings), strict=True
        ):
            assert torch.equal(found, expected)


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        ids, logprob = flexkernels.sample_logits(torch.empty(3, 9, dtype=torch.half), top_k=2, return_logprob=True)
    assert (ids.shape, ids.dtype, logprob.shape, logprob.dtype) == ((3,), torch.int64, (3,), torch.float32)


@needs_gpu
def test_cuda_graph_replays():
    logits, offset = torch.randn(4, 1000, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    seed = torch.arange(4, device="cuda")
    flexkernels.sample_logits(logits, seed=seed, offset=offset, top_k=50)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = flexkernels.sample_logits(logits, seed=seed, offset=offset, top_k=50)
    for _ in range(3):
        offset += 1
        graph.replay()
        assert torch.equal(ids, flexkernels.sample_logits(logits, seed=seed, offset=offset, top_k=50))


# wrong input

X = torch.zeros(2, 8)
WRONG = [
    ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
    ({"logits": X.double()}, TypeError, "logits must be float32 or bfloat16 or float16, got float64"),
    ({"logits": X[0]}, ValueError, r"logits must have 2 dimensions, got shape \[8\]"),
    ({"logits": X[:, :0]}, ValueError, "logits must have between 1 and 262144 columns, got 0"),
    ({"uncond_logits": X.half()}, TypeError, "uncond_logits must be float32, got float16"),
    ({"uncond_logits": X[:1]}, ValueError, r"uncond_logits must have the shape \[2, 8\] of logits"),
    ({"guidance": 2.0}, ValueError, "guidance must be 1 without uncond_logits, got 2.0"),
    ({"guidance": math.nan}, ValueError, "guidance must be finite, got nan"),
    ({"temperature": -0.1}, ValueError, "temperature must be at least 0, got -0.1"),
    ({"temperature": math.nan}, ValueError, "temperature must be finite, got nan"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 2.0}, TypeError, "top_k must be an int or None, got float"),
    ({"top_k": True}, TypeError, "top_k must be an int or None, got bool"),
    ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
    ({"seed": False}, TypeError, "seed must be an int or an int64 tensor, got bool"),
    ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p must be above 0 and at most 1, got 1.1"),
    ({"top_p": math.nan}, ValueError, "top_p must be finite, got nan"),
    ({"min_p": 1.0}, ValueError, "min_p must be at least 0 and below 1, got 1.0"),
    ({"min_p": -0.5}, ValueError, "min_p must be at least 0 and below 1, got -0.5"),
    ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
    ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
    ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "seed must be int64, got int32"),
    ({"offset": torch.zeros(3, dtype=torch.int64)}, ValueError, r"offset must have the shape \[2\], got \[3\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_is_refused(change, error, message):
    arguments = {"logits": X} | change
    for function in (flexkernels.sample_logits, flexkernels.sample_logits_ref):
        with pytest.raises(error, match=message):
            function(arguments["logits"], **{k: v for k, v in arguments.items() if k != "logits"})

"""Decoding from CUDA graphs, on a stand-in that notes ops (tests/support/tape.py): the same bits as without."""

import copy

import pytest
import tape
import torch
from golden_tokenizer import load, samples

import flexkernels
import vft
from vft import graphs
from vft.solver import SOLVERS, interval
from vft.states import Flow

MOMENTUM = vft.APG(5.0, 0.6, 0.1, -0.5)


@pytest.fixture
def made(monkeypatch):
    """The graphs that were captured; tokenizers say that they are on a GPU."""
    found = tape.install(monkeypatch)
    monkeypatch.setattr(vft.Tokenizer, "step_graphs", property(lambda t: t._graphs if t.cuda_graphs else None))
    return found


@pytest.fixture
def model():
    return copy.deepcopy(load("base")[0])


def decode(model, graphed, case="base", seed=0, keep=(4, 11), **options):
    """Golden tokens from other noise for each seed."""
    _, io, _ = load(case)
    model.cuda_graphs = graphed
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(x.shape, generator=generator) for x in samples(io, "noise")]
    return model.decode_latents(samples(io, "tokens"), list(keep), noise=noise, **options)


def assert_same(model, **options):
    got, want = decode(model, True, **options), decode(model, False, **options)
    for g, w in zip(got, want, strict=True):
        assert torch.isfinite(w).all() and torch.equal(g, w), options


def poison(model):
    """Fills all that a run holds between calls with NaN; what a kept run reads, its decode has written."""
    for run in model._graphs._kept.values():
        for _, state in run.flow.parts:
            for t in (state.stage, *state.states, *state.past):
                t.fill_(torch.nan)
            if state.prefix is not None:
                state.prefix.values.fill_(torch.nan)
        for t in (run.scalars, *(run.modulation or ()), *(run.flow.difference or ()), run.flow.momentum):
            if t is not None:
                t.fill_(torch.nan)


# graphs that a decode of six steps captures: one for each kind of evaluation that comes more than once
CAPTURED = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 2, "ab2": 1, "ab3": 1, "dpm2m": 1}


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_graph_serves_all_steps_and_schedules(solver, made, model):
    options = dict(solver=solver, guidance=vft.CFG(3.0))
    assert_same(model, steps=6, **options)
    assert len(made) == CAPTURED[solver]
    # every evaluation but those that ran as they are
    assert sum(g.replays for g in made) == 6 * SOLVERS[solver] + (solver == "ab3") - len(made) - 2 * (solver == "ab3")
    poison(model)
    before = len(made)
    assert_same(model, steps=[1.0, 0.7, 0.6, 0.2, 0.0], seed=1, **options)
    # the first step of ab3 is one of Heun's, whose kinds now come for the second time
    assert len(made) == before + 2 * (solver == "ab3") and len(model._graphs._kept) == 1


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        (None, dict(guidance=None)),
        ("clean", dict(guidance=vft.APG(25.0, 0.6))),
        ("sdedit", dict(guidance=MOMENTUM)),
        (None, dict(guidance=vft.CFG(lambda t: 1 + 4 * t, rescale=0.7))),
        ("sdedit", dict(guidance=vft.CFG(interval(3.0, 0.3, 0.8)), solver="heun")),
        (None, dict(guidance=vft.APG(interval(3.0, 0.3, 0.8), momentum=-0.5))),
        ("clean", dict(guidance=vft.CFG(3.0), null_every=2)),
        (None, dict(guidance=vft.CFG(interval(3.0, 0.1, 0.9)), null_every=3, solver="ab2")),
    ],
    # not of their values: those of functions hold addresses
    ids=["none", "apg", "momentum", "rescale", "interval heun", "interval momentum", "null_every", "interval ab2"],
)
def test_guidance_and_prefixes(prefix, options, made, model):
    if prefix is not None:
        _, io, _ = load("base")
        frames = [x[:, :1] for x in samples(io, "noise")]
        options = options | dict(prefix=frames, prefix_mode=prefix)
    for seed in range(2):
        assert_same(model, steps=7, seed=seed, **options)
        poison(model)
    assert made and all(g.replays for g in made)


def test_a_shared_momentum_is_handed_on(made, model):
    """Of samples of one shape, as that fault of published code needs."""
    _, io, _ = load("base")
    ids, noise = [io["tokens_0"][0]] * 2, [torch.randn(io["noise_0"][0].shape) for _ in range(2)]
    options = dict(guidance=MOMENTUM, compat=("shared_momentum",), noise=noise)
    for _ in range(2):
        found = []
        for model.cuda_graphs in (True, False):
            found.append(model.decode_latents(ids, 4, 5, **options))
        assert all(torch.equal(g, w) for g, w in zip(*found, strict=True))
        poison(model)
    assert len(made) == 1


def test_scales_share_a_graph_and_other_settings_do_not(made, model):
    for scale in (3.0, 5.0, lambda t: 2 + t):
        assert_same(model, steps=4, guidance=vft.CFG(scale))
    assert len(made) == 1
    assert_same(model, steps=4, guidance=vft.CFG(3.0, rescale=0.5))
    assert_same(model, steps=4, guidance=vft.APG(3.0))
    assert_same(model, steps=4, guidance=vft.CFG(3.0), keep=(4, 10))
    assert len(made) == 4 and len(model._graphs._kept) == graphs.KEPT == 4
    assert_same(model, steps=4, guidance=None)
    assert len(model._graphs._kept) == 4


def test_a_step_is_four_launches(made, model):
    """Numbers, two parts of the modulation, the graph; once a decode the noise, the registers and the table."""
    options = dict(guidance=vft.APG(4.0), keep=(4, 11))
    decode(model, True, steps=3, **options)
    counts = []
    for steps in (4, 9):
        replayed = made[0].replays
        with tape.Counting() as counting:
            real, made[0].calls = made[0].calls, []
            decode(model, True, steps=steps, **options)
            made[0].calls = real
        assert made[0].replays == replayed + steps
        counts.append([name for name in counting.names if name == "copy_.default"])
    # the table of modulations is made whole: nothing else grows with the steps
    assert len(counts[1]) - len(counts[0]) == 3 * 5
    # what the graph holds but for the decoder: state and velocities in flat form, the update and a copy of it
    launches = [func.__name__ for func, *_ in made[0].calls]
    assert launches.count("flow_update.default") == 1 and launches[-2:] == ["flow_update.default", "copy_.default"]


def test_what_a_decode_gives_outlives_the_next(made, model):
    first = decode(model, True, steps=4)
    kept = [x.clone() for x in first]
    decode(model, True, steps=4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_decodes_inside_of_each_other_have_buffers_of_their_own(made, model):
    inner = []

    def progress(done):
        if done == 3 and not inner:
            inner.extend(decode(model, True, steps=5, seed=1))

    got, want = decode(model, True, steps=5, progress=progress), decode(model, False, steps=5)
    other = decode(model, False, steps=5, seed=1)
    assert all(torch.equal(g, w) for g, w in zip([*got, *inner], [*want, *other], strict=True))


@pytest.mark.parametrize("where", [1, 2, 4])
def test_an_exception_leaves_nothing_broken(where, made, model, monkeypatch):
    """In the first turn, which compiles; in the second, while it is captured; and between later ones."""
    inner, calls = Flow.advance, []

    def failing(*args, **options):
        calls.append(0)
        if len(calls) == where:
            raise KeyboardInterrupt
        return inner(*args, **options)

    def stop(done):
        if done == where - 1:
            raise KeyboardInterrupt

    options = dict(guidance=MOMENTUM, steps=6)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Flow, "advance", failing)
        decode(model, True, progress=stop if where == 4 else None, **options)
    poison(model)
    assert_same(model, **options, seed=1)
    assert len(made) in (1, 2) and len(model._graphs._kept) == 1


def test_other_weights_are_another_run_and_copies_keep_none(made, model):
    assert_same(model, steps=4)
    assert not copy.deepcopy(model)._graphs._kept
    model.double().float()
    assert_same(model, steps=4)
    assert len(model._graphs._kept) == 2


def test_a_first_turn_makes_the_calls_that_are_captured(made, model, monkeypatch):
    """A kernel that is first launched in a capture would be compiled and loaded there."""
    inner, given = flexkernels.flow_update, []

    def noting(*args, **options):
        given.append(options["scalars"] is not None)
        return inner(*args, **options)

    monkeypatch.setattr(flexkernels, "flow_update", noting)
    decode(model, True, steps=4, guidance=vft.CFG(3.0))
    assert given == [True, True] and len(made) == 1


def test_streams_have_buffers_of_their_own(made, model, monkeypatch):
    """The host is through with a decode before the stream is."""
    for stream in (1, 2, 1):
        monkeypatch.setattr(graphs, "_stream", lambda device: stream)  # noqa: B023
        assert_same(model, steps=4)
    assert len(made) == len(model._graphs._kept) == 2


def test_under_autocast_there_are_none(model, monkeypatch):
    monkeypatch.setattr(vft.Tokenizer, "device", torch.device("cuda", 0))
    assert model.step_graphs is model._graphs
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert model.step_graphs is None


def test_graphs_are_for_gpus(model):
    assert model.step_graphs is None

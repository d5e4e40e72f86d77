"""Speculative decoding: the ids are those without a draft, however good or bad the draft is."""

import copy
from functools import cache

import pytest
import torch
from golden_generator import CASES, conditions
from paths import GENERATORS

import vft
from vft import speculation
from vft.config import parse_generator_config


@cache
def load(case, **options):
    return vft.Generator.from_pretrained(GENERATORS / case, **dict(options))


@cache
def near(case):
    """A draft that is often right: the model with a little noise on its weights."""
    draft = copy.deepcopy(load(case))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return draft


def far(case):
    """A shallower draft of another width that is hardly ever right."""
    config = dict(load(case).config.raw, depth=1)
    torch.manual_seed(1)
    return vft.Generator(parse_generator_config(config)).eval().requires_grad_(False)


def rounds(monkeypatch):
    """A list that gets an entry a round."""
    seen, real = [], speculation.Speculation.round
    monkeypatch.setattr(speculation.Speculation, "round", lambda self, limit: (seen.append(limit), real(self, limit)))
    return seen


SETTINGS = [
    dict(temperature=0),
    dict(temperature=0, guidance=2.0),
    dict(),
    dict(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01),
    dict(guidance=2.0, top_p=0.8),
    dict(guidance=-1.0, temperature=1.3, top_k=20),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ids_are_those_without_a_draft(case, settings, monkeypatch):
    gen, seen = load(case), rounds(monkeypatch)
    options = dict(frames=3, tokens_per_frame=6, seed=7, **settings)
    want = gen.generate(**conditions(case), **options)
    one = {name: value[:1] for name, value in conditions(case).items()}
    for draft, tokens in ((near(case), 4), (far(case), 2), (gen, 5)):
        seen.clear()
        got = gen.generate(**conditions(case), **options, draft=draft, draft_tokens=tokens)
        assert torch.equal(got, want) and got.is_contiguous()
        # after the first token come 17: one a round where the draft is always wrong, all proposals and one at best
        if draft is gen:
            assert len(seen) == 3
        elif draft is near(case):
            assert 4 <= len(seen) < 17
        assert len(seen) <= 17
    assert torch.equal(gen.generate(**one, **options, draft=near(case), draft_tokens=8), want[:1])


@pytest.mark.parametrize("case", CASES)
def test_prompts_stops_and_levels(case):
    gen, prompt = load(case), [[5], list(range(5)), [7] * 6]
    options = dict(frames=2, tokens_per_frame=[1, 6, 3], prompt=prompt, seed=1, guidance=1.5)
    want = gen.generate(**conditions(case), **options)
    levels = list(gen.stream(**conditions(case), **options, draft=near(case), draft_tokens=3))
    assert torch.equal(levels[-1], want) and len(levels) > 1
    for ids in levels:
        assert torch.equal(ids, want[..., : ids.shape[-1]])
    # nothing to draw, and no rows
    full = gen.generate(**conditions(case), frames=1, tokens_per_frame=2, prompt=torch.tensor([1, 2]), draft=gen)
    assert full.tolist() == [[[1, 2]]] * 3
    one = {name: value[:1] for name, value in conditions(case).items()}
    assert gen.generate(**one, n=0, frames=1, tokens_per_frame=2, draft=gen).shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("ar_class", {"weights": "int8"}),
        ("ar_text", {"dtype": torch.bfloat16}),
        pytest.param("ar_text", {"weights": "int8"}, marks=pytest.mark.slow),
        pytest.param("ar_class", {"dtype": torch.bfloat16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_of_fewer_bytes_is_a_draft_of_its_own(case, options, monkeypatch):
    gen, seen = load(case), rounds(monkeypatch)
    run = dict(frames=5, tokens_per_frame=5, seed=3, guidance=2.0)
    want = gen.generate(**conditions(case), **run)
    assert torch.equal(gen.generate(**conditions(case), **run, draft=load(case, **options)), want)
    # 24 tokens after the first: five rounds of five if every proposal was right
    assert len(seen) <= 12


def test_the_distribution_is_the_models():
    config = dict(vocab=8, seq_len=4, cond="class", n_classes=2)
    gen, draft = (vft.Generator(parse_generator_config(config | {"depth": d})).eval() for d in (2, 1))
    with torch.no_grad():
        for parameter in (*gen.parameters(), *draft.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    n, options = 4000, dict(temperature=0.8, top_k=6, guidance=1.5)
    # the probability of each pair of tokens, from filtered guided logits of every first token
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    cond, uncond = gen.logits(pairs, 0), gen.logits(pairs, unconditional=True)
    logits = (uncond + 1.5 * (cond - uncond)).double()
    logits = logits.masked_fill(logits < logits.topk(6).values[..., -1:], -torch.inf) / 0.8
    chosen = logits.log_softmax(-1).gather(-1, pairs[..., None])[..., 0].sum(1).exp()
    assert abs(chosen.sum() - 1) < 1e-6
    ids = gen.generate(0, n=n, frames=1, tokens_per_frame=2, seed=11, draft=draft, draft_tokens=2, **options)
    counts = torch.bincount(ids[:, 0, 0] * 8 + ids[:, 0, 1], minlength=64)
    possible = chosen > 0
    assert counts[~possible].sum() == 0 and 30 <= possible.sum() <= 36
    expected = n * chosen[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    # 35 degrees of freedom: 67 is exceeded once in a thousand
    assert statistic < 67


class FakeGraph:
    def __init__(self, run):
        self.replay = run


def test_rounds_are_replayed_from_graphs(monkeypatch):
    gen, captured = load("ar_class"), []

    def capture(run, changed=(), pool=None):
        before = [t.clone() for t in changed]
        run()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        captured.append(run)
        return FakeGraph(run), None

    monkeypatch.setattr(speculation, "capture", capture)
    monkeypatch.setattr(speculation, "BUCKET", 8)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    options = dict(frames=2, tokens_per_frame=[4, 8, 10], seed=2, guidance=2.0)
    want = gen.generate(**conditions("ar_class"), **options, cuda_graph=False)
    monkeypatch.setattr(type(gen), "_graphs_wanted", lambda self, wanted: True)
    got = gen.generate(**conditions("ar_class"), **options, draft=near("ar_class"))
    # caches of 8, 16, 24 and 25 positions
    assert torch.equal(got, want) and 3 <= len(captured) <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": "tiny"}, "draft must be a Generator, got str"),
        ({"draft_tokens": 0}, "draft_tokens must be at least 1, got 0"),
        ({"draft_tokens": 16}, "draft_tokens must be at most 15, got 16"),
        ({"draft_tokens": 2.0}, "draft_tokens must be an int, got float"),
        ({"vocab": 999}, "draft must have the model's vocab 1000, got 999"),
        ({"n_classes": 6, "classes": []}, "draft must have the model's n_classes 7, got 6"),
        ({"classes": []}, r"draft must have the model's classes \('class 0', .*, got \(\)"),
        ({"seq_len": 14}, "draft must have a seq_len of at least 15 tokens, got 14"),
    ],
)
def test_drafts_that_do_not_fit(change, message):
    gen, change = load("ar_class"), dict(change)
    options = {name: change.pop(name) for name in ("draft", "draft_tokens") if name in change}
    raw = gen.config.raw | {"depth": 1} | change
    options.setdefault("draft", vft.Generator(parse_generator_config(raw)))
    with pytest.raises((TypeError, ValueError), match=message):
        gen.stream(1, frames=5, tokens_per_frame=3, **options)


def test_a_draft_of_other_conditions_or_of_another_device():
    gen = load("ar_class")
    with pytest.raises(ValueError, match="draft must have the model's cond 'class', got 'text'"):
        gen.generate(1, draft=load("ar_text"))
    with pytest.raises(ValueError, match="draft must be on cpu like the model, got meta"):
        gen.generate(1, draft=copy.deepcopy(gen).to("meta"))


def test_nan_logits_are_an_error():
    gen = copy.deepcopy(load("ar_class"))
    gen.pos_emb.data[3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        gen.generate(1, frames=2, tokens_per_frame=3, draft=near("ar_class"))

"""Continuous batching: whatever joins, leaves and runs beside it, a request's ids are those of a run of its own."""

import contextlib
import copy
import random
import warnings
from functools import cache

import pytest
import torch
from golden_generator import CASES, conditions
from paths import GENERATORS

import vft
from vft import session as session_module
from vft.fingerprint import TokensWarning


@cache
def load(case, **options):
    return vft.Generator.from_pretrained(GENERATORS / case, **dict(options))


SETTINGS = [
    dict(frames=2, tokens_per_frame=3, seed=1),
    dict(frames=3, tokens_per_frame=5, seed=2, guidance=2.0, temperature=0.8),
    dict(frames=1, tokens_per_frame=1, temperature=0),
    dict(frames=2, tokens_per_frame=4, seed=1, top_k=20, guidance=1.0),
    dict(frames=5, tokens_per_frame=2, seed=4, top_p=0.8, guidance=2.0, prompt=torch.tensor([7, 1, 900])),
    dict(frames=2, tokens_per_frame=3, seed=9, min_p=0.02, guidance=-0.5),
    dict(frames=3, tokens_per_frame=4, temperature=0, guidance=3.0),
    dict(frames=1, tokens_per_frame=3, prompt=torch.tensor([1, 2, 3])),
    dict(frames=2, tokens_per_frame=3, seed=2**40),
    dict(frames=3, tokens_per_frame=5, seed=2, guidance=2.0, temperature=0.8, prompt=torch.arange(12)),
]


def requests(case):
    """Each of the settings with one of the conditions."""
    return [{**conditions(case, slice(i % 3, i % 3 + 1)), **options} for i, options in enumerate(SETTINGS)]


def passes(monkeypatch):
    """A list that gets (rows, cache positions) of every step of a model from now on."""
    sizes, hidden = [], vft.Generator.hidden

    def seen(self, view, *rest):
        sizes.append((len(view.ids), view.k.shape[3]))
        return hidden(self, view, *rest)

    monkeypatch.setattr(vft.Generator, "hidden", seen)
    return sizes


def run(session, arrivals):
    """ids of each handle; arrivals[i]: the requests that come before step i."""
    handles, ids = {}, {}
    while arrivals or session.waiting or session.running:
        for number, request in arrivals.pop(0) if arrivals else ():
            handles[session.add(**request)] = number
        session.step()
        for handle, done in session.finished():
            assert handle in handles and handle not in ids
            ids[handle] = done
    assert session.finished() == []
    return {handles[handle]: done for handle, done in ids.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("max_rows", "options"),
    [(2, {}), (5, {}), (24, {}), (5, {"weights": "int8"}), (24, {"dtype": torch.bfloat16})],
    ids=str,
)
def test_ids_are_those_of_single_runs(case, options, max_rows):
    gen, asked = load(case, **options), list(enumerate(requests(case)))
    want = {i: gen.generate(**request)[0] for i, request in asked}
    shuffle = random.Random(max_rows)
    for _ in range(2):
        shuffle.shuffle(asked)
        # staggered: some at once, some while others run
        arrivals = [asked[:4], [], asked[4:5], asked[5:6], [], [], asked[6:]]
        got = run(gen.session(max_rows), arrivals)
        assert sorted(got) == sorted(want)
        for i, ids in got.items():
            assert ids.shape == want[i].shape and torch.equal(ids, want[i]), SETTINGS[i]


def test_rows_are_reused_and_nothing_else_is_computed(monkeypatch):
    gen, sizes = load("ar_class"), passes(monkeypatch)
    session = gen.session(3)
    cache = session.k.data_ptr()
    # one row, two rows, one row
    session.add(1, frames=1, tokens_per_frame=3)
    session.add(2, frames=1, tokens_per_frame=5, guidance=2.0)
    session.add(3, frames=1, tokens_per_frame=4)
    seen = []
    while session.waiting or session.running:
        session.step()
        seen.append((session.waiting, session.running))
    # the third waits for the first to be done, and draws its first token beside the third step's
    assert [rows for rows, _ in sizes] == [3, 3, 3, 3, 1] and session.k.data_ptr() == cache
    assert seen == [(1, 2), (1, 2), (0, 2), (0, 2), (0, 1), (0, 0)]
    assert [handle for handle, _ in session.finished()] == [0, 1, 2]


@pytest.mark.parametrize("case", CASES)
def test_cancelled_requests_leave_the_others_alone(case):
    gen, asked = load(case), requests(case)
    session = gen.session(6)
    handles = [session.add(**request) for request in asked]
    session.step()
    running, waiting = handles[1], handles[-1]
    session.cancel(waiting)
    session.step()
    session.cancel(running)
    done = {}
    while session.waiting or session.running:
        session.step()
        done |= dict(session.finished())
    assert sorted(done) == [h for h in handles if h not in (running, waiting)]
    for handle, ids in done.items():
        assert torch.equal(ids, gen.generate(**asked[handle])[0])
    for handle in (running, waiting, handles[0], 99, None):
        with pytest.raises(ValueError, match=f"waiting or running request, got {handle}"):
            session.cancel(handle)


def test_nan_logits_are_the_error_of_their_request():
    gen = copy.deepcopy(load("ar_class"))
    gen.cls_emb.weight.data[1] = torch.nan
    session, options = gen.session(4), dict(frames=2, tokens_per_frame=2)
    for class_id in (2, 1, 3):
        session.add(class_id, **options)
    for _ in range(4):
        session.step()
    ((handle, ids),) = session.finished()
    assert handle == 0 and torch.equal(ids, gen.generate(2, **options)[0])
    with pytest.raises(ValueError, match="request 1: the generator's logits are NaN"):
        session.finished()
    ((handle, ids),) = session.finished()
    assert handle == 2 and torch.equal(ids, gen.generate(3, **options)[0])


class Graphs:
    """CUDA graphs on the CPU: a capture runs the pass once, a replay again into the same result."""

    def __init__(self):
        self.captured = 0

    def capture(self, run, changed=(), pool=None):
        self.captured += 1
        out = run()
        graph = type("Graph", (), {"replay": lambda _: out.copy_(run())})()
        return graph, out


@pytest.mark.parametrize("case", CASES)
def test_one_graph_a_bucket_with_masked_rows(case, monkeypatch):
    gen, graphs = load(case), Graphs()
    want = {i: gen.generate(**request)[0] for i, request in enumerate(requests(case))}
    monkeypatch.setattr(session_module, "capture", graphs.capture)
    monkeypatch.setattr(session_module, "BUCKET", 8)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    session = session_module.Session(gen, 12, 16, 6 if case == "ar_text" else 0, cuda_graph=True)
    sizes = passes(monkeypatch)
    asked = list(enumerate(requests(case)))
    for _ in range(2):
        got = run(session, [asked[:4], [], asked[4:6], asked[6:]])
        assert sorted(got) == sorted(want)
        assert all(torch.equal(ids, want[i]) for i, ids in got.items())
        # one capture a bucket, none in the second round
        assert graphs.captured == len(set(sizes))
    assert {rows for rows, _ in sizes} <= {1, 2, 4, 8, 12} and {limit for _, limit in sizes} == {8, 16}


def test_nothing_is_read_back_in_a_step(monkeypatch):
    gen = load("ar_class")
    session = gen.session(4)
    for request in requests("ar_class")[:3]:
        session.add(**request)
    session.step()

    def refuse(*_):
        raise AssertionError("a value was read")

    read = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in read:
            patch.setattr(torch.Tensor, name, refuse)
        while session.running:
            session.step()
    assert len(session.finished()) == 3


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("ar_class", {"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ("ar_class", {"max_rows": 1.5}, "max_rows must be an int, got float"),
        ("ar_class", {"max_len": 81}, "max_len must be at most seq_len = 80, got 81"),
        ("ar_class", {"max_len": 0}, "max_len must be at least 1, got 0"),
        ("ar_class", {"text_len": 4}, "text_len must be None: this model is conditioned on classes"),
        ("ar_text", {"text_len": 0}, "text_len must be at least 1, got 0"),
        ("ar_class", {"cuda_graph": True}, "cuda_graph must be off on cpu"),
    ],
)
def test_bad_sessions(case, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load(case).session(**options)


@pytest.mark.parametrize(
    ("case", "request_", "message"),
    [
        ("ar_class", {}, "class_id must be given"),
        ("ar_class", {"class_id": [1, 2]}, "must hold 1 or n = 1 rows, got 2"),
        (
            "ar_class",
            {"class_id": 1, "guidance": 2.0},
            "max_rows must be at least 2 for a request with guid.*, got 1",
        ),
        ("ar_class", {"class_id": 1, "tokens_per_frame": 5}, "at most max_len = 20, got 25"),
        ("ar_class", {"class_id": 1, "temperature": -1}, "temperature must be at least 0"),
        ("ar_class", {"class_id": 1, "prompt": [[1], [2]]}, r"one a row \(1\), got 2"),
        ("ar_class", {"class_id": 1, "seed": -1}, "seed must be at least 0"),
        (
            "ar_text",
            {"text_emb": torch.zeros(9, 48), "frames": 1},
            "text_emb must have at most text_len = 8 tokens, got 9",
        ),
    ],
)
def test_bad_requests(case, request_, message):
    session = load(case).session(1, max_len=20, **{"text_len": 8} if case == "ar_text" else {})
    with pytest.raises((TypeError, ValueError), match=message):
        session.add(**request_)
    session.step()
    assert session.waiting == session.running == 0 and session.finished() == []


def test_frames_beyond_the_training_warn_where_they_are_asked_for():
    gen = copy.copy(load("ar_class"))
    frames = gen.config.trained_frames + 1
    for call in (gen.session(1).add, gen.stream):
        with pytest.warns(TokensWarning, match=f"frames {frames} are more") as caught:
            call(1, frames=frames, tokens_per_frame=1)
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gen.session(1).add(1)

"""The generator against what the published implementation computes, and its loop against teacher forcing."""

import contextlib
import copy
import gc
import inspect
import json
import shutil
import weakref
from functools import cache

import pytest
import torch
from golden_generator import CASES, conditions, io
from paths import GENERATORS
from safetensors.torch import load_file, save_file

import flexkernels
import vft
from vft import checkpoint, decoding
from vft.config import parse_generator_config

FRAMES = 5


@cache
def load(case, **options):
    return vft.Generator.from_pretrained(GENERATORS / case, **dict(options))


def guided(gen, ids, guidance, **condition):
    """Teacher-forced guided logits of ids [n, T, k]."""
    flat = vft.time_first(ids)
    cond, uncond = gen.logits(flat, **condition), gen.logits(flat, unconditional=True)
    return uncond + guidance * (cond - uncond)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_published_greedy_ids(case, guidance):
    ids = load(case).generate(**conditions(case), frames=FRAMES, tokens_per_frame=8, temperature=0, guidance=guidance)
    assert ids.dtype == torch.int64 and ids.shape == (3, FRAMES, 8) and ids.is_contiguous()
    assert torch.equal(vft.time_first(ids), io(case)[f"greedy_ids_cfg{guidance}"])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_published_logits(case, guidance):
    gen, name = load(case), f"_cfg{guidance}"
    flat = io(case)["greedy_ids" + name]
    logits = gen.logits(flat, **conditions(case))
    if guidance != 1:
        uncond = gen.logits(flat, unconditional=True)
        logits = uncond + guidance * (logits - uncond)
    assert logits.dtype == torch.float32
    for got, want in (
        (logits[:, 0], "greedy_logits" + name + "_first"),
        (logits[:, -1], "greedy_logits" + name + "_last"),
        (logits.logsumexp(-1), "logsumexp" + name),
    ):
        # guidance magnifies rounding: relative to the largest value
        exact = io(case)[want]
        assert (got - exact).abs().max() < 1e-5 * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("case", CASES)
def test_teacher_forced_logits_are_those_of_the_loop(case, monkeypatch):
    gen, seen = load(case), []
    draw = type(gen).draw
    monkeypatch.setattr(type(gen), "draw", lambda self, x, *rest: (seen.append(self.head(x)), draw(self, x, *rest))[1])
    ids = gen.generate(**conditions(case), frames=2, tokens_per_frame=6, temperature=0)
    want = gen.logits(vft.time_first(ids), **conditions(case))
    assert (torch.stack(seen, 1) - want).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_ragged_prompts_continue_as_if_generated(case, guidance):
    gen = load(case)
    options = dict(frames=3, tokens_per_frame=5, temperature=0, guidance=guidance)
    whole = gen.generate(**conditions(case), **options)
    flat = vft.time_first(whole)
    prompt = [flat[0, :7], flat[1, :0], flat[2, :15]]
    assert torch.equal(gen.generate(**conditions(case), **options, prompt=prompt), whole)
    assert torch.equal(gen.generate(**conditions(case), **options, prompt=flat[:, :4]), whole)
    assert torch.equal(gen.generate(**conditions(case), **options, prompt=flat), whole)


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_that_greedy_would_not_give(case):
    gen, prompt = load(case), torch.arange(6) * 31
    options = dict(frames=2, tokens_per_frame=5, temperature=0, guidance=2.0, prompt=prompt)
    ids = gen.generate(**conditions(case), **options)
    flat = vft.time_first(ids)
    assert torch.equal(flat[:, :6], prompt.expand(3, 6))
    assert torch.equal(flat[:, 6:], guided(gen, ids, 2.0, **conditions(case)).argmax(-1)[:, 6:])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_rows_stop_at_their_own_length(case, temperature):
    gen = load(case)
    options = dict(frames=3, temperature=temperature, guidance=2.0, seed=5, top_k=50)
    whole = gen.generate(**conditions(case), **options, tokens_per_frame=6)
    cut = gen.generate(**conditions(case), **options, tokens_per_frame=[2, 6, 3])
    assert cut.shape == whole.shape
    for row, k in enumerate((2, 6, 3)):
        assert torch.equal(cut[row, :, :k], whole[row, :, :k])
        assert (cut[row, :, k:] == -1).all()


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_step_in_one_call_equals_the_ops_one_by_one(case, options, monkeypatch):
    gen, steps = load(case, **options), []
    step = vft.generator.transformer_step_

    def beside(x, stack, k, v, *rest, **cross):
        # the op by op loop on copies of what the step is given
        view = steps[-1]._replace(k=k.clone(), v=v.clone())
        with flexkernels.backend("cpu"):
            want = gen.blocks_step(x.clone(), view)
        step(x, stack, k, v, *rest, **cross)
        # the caches hold NaN where no token is yet
        torch.testing.assert_close((x, k, v), (want, view.k, view.v), rtol=0, atol=0, equal_nan=True)
        steps.append("compared")

    view = decoding.State.view
    monkeypatch.setattr(decoding.State, "view", lambda self, *key: (steps.append(view(self, *key)), steps[-1])[1])
    monkeypatch.setattr(vft.generator, "transformer_step_", beside)
    gen.generate(**conditions(case), frames=2, tokens_per_frame=[2, 3, 3], guidance=2.0, temperature=0)
    assert steps.count("compared") == 5


@pytest.mark.parametrize("case", CASES)
def test_one_kernel_for_all_blocks_where_a_gpu_has_it(case, monkeypatch):
    gen, asked = load(case, dtype=torch.bfloat16), []
    given = {"class_id": None, "text_emb": None, "text_mask": None} | conditions(case, slice(1))
    sampling = decoding.Sampling(guidance=2.0)
    request = gen.request(**given, n=1, frames=2, tokens_per_frame=2, prompt=None, sampling=sampling)
    state = decoding.State(gen, request, 1, sampling)
    view, reasons = state.view(1, 4), {"none": None, "some": "it is too small"}
    # neither of the CPU nor of a GPU that is needed here: only the op knows
    x = torch.empty(2, gen.config.width, dtype=torch.bfloat16, device="meta")
    monkeypatch.delenv("FLEXKERNELS_PERSISTENT_STEP", raising=False)
    for name, reason in reasons.items():
        monkeypatch.setattr(
            vft.generator,
            "transformer_step_refusal",
            lambda *args, **kw: (asked.append((args, kw)), reason)[1],  # noqa: B023
        )
        assert gen._in_one_call(x, view, state.stack) is (name == "none")
    (args, context), _ = asked
    assert args[1] is state.stack and args[2] is view.k and args[4] is view.length
    assert set(context) == ({"cross", "cross_len"} if case == "ar_text" else set())
    many = torch.empty(17, gen.config.width, dtype=torch.bfloat16, device="meta")
    assert not gen._in_one_call(many, view, state.stack) and not gen._in_one_call(x, view, None)
    monkeypatch.setenv("FLEXKERNELS_PERSISTENT_STEP", "0")
    assert not gen._in_one_call(x, view, state.stack) and len(asked) == 2


def test_more_rows_than_the_step_in_one_call_takes(monkeypatch):
    gen = load("ar_class")
    options = dict(frames=2, tokens_per_frame=3, guidance=2.0, temperature=0)
    want = gen.generate(class_id=[3], **options)
    monkeypatch.setattr(vft.generator, "transformer_step_", None)
    assert torch.equal(gen.generate(class_id=[3] * 17, **options), want.expand(17, 2, 3))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"dtype": torch.bfloat16}], ids=str)
def test_rows_in_parts_have_the_bits_of_rows_alone(case, options, monkeypatch):
    gen, seen, sizes = load(case, **options), [], []
    draw, step = type(gen).draw, vft.generator.transformer_step_
    monkeypatch.setattr(type(gen), "draw", lambda self, x, *rest: (seen.append(x.clone()), draw(self, x, *rest))[1])
    monkeypatch.setattr(
        vft.generator, "transformer_step_", lambda x, *a, **kw: (sizes.append(len(x)), step(x, *a, **kw))
    )
    condition = {name: value.repeat(7, *[1] * (value.dim() - 1))[:19] for name, value in conditions(case).items()}
    run = dict(frames=2, tokens_per_frame=2, temperature=0)
    many = gen.generate(**condition, **run)
    # the rows of three conditions, again and again
    assert sizes == [10, 9] * 3
    batch, seen[:] = torch.stack(seen[1:]), []
    for row in range(3):
        alone = gen.generate(**conditions(case, slice(row, row + 1)), **run)
        assert torch.equal(many[row::3], alone.expand(len(many[row::3]), 2, 2))
        # captions are projected together, whose sums are then rounded in another order
        if case == "ar_class":
            assert torch.equal(batch[:, row::3], torch.stack(seen[1:]).expand(-1, len(many[row::3]), -1))
        seen.clear()


def test_linear_layers_of_some_and_of_many_rows():
    from vft.generator_layers import Linear, parts

    assert [[p.stop - p.start for p in parts(n)] for n in (0, 1, 16, 17, 18, 33)] == [
        [0], [1], [16], [10, 7], [10, 8], [12, 12, 9]
    ]  # fmt: skip
    layer, dense = Linear(48, 32), Linear(48, 32)
    layer.quantize("int8")
    dense.weight.data = layer.weight * layer.scale[:, None]
    x, residual = torch.randn(100, 48), torch.randn(100, 32)
    with torch.no_grad():
        for rows in (1, 16, 17, 32, 33, 64, 65, 100):
            want = torch.nn.functional.linear(x[:rows].double(), dense.weight.double())
            for each in (layer, dense):
                assert (each(x[:rows]) - want).abs().max() < 1e-5
                assert (each(x[:rows], residual[:rows]) - want - residual[:rows]).abs().max() < 1e-5
                gate, up = want.chunk(2, 1)
                got = each(x[:rows], activation="swiglu")
                assert (got - torch.nn.functional.silu(gate) * up).abs().max() < 1e-5


def test_finished_rows_drop_out(monkeypatch):
    gen, rows = load("ar_class"), []
    step = type(gen).step
    monkeypatch.setattr(type(gen), "step", lambda self, s, m, limit: (rows.append(m), step(self, s, m, limit))[1])
    prompt = [[1] * 3, [1], [1] * 3]
    gen.generate(**conditions("ar_class"), frames=1, tokens_per_frame=[3, 3, 6], prompt=prompt, temperature=0)
    assert rows == [2, 1]


@pytest.mark.parametrize("case", CASES)
def test_one_condition_serves_many_rows(case):
    gen, options = load(case), dict(frames=2, tokens_per_frame=4, guidance=1.5)
    one = {name: value[:1] for name, value in conditions(case).items()}
    ids = gen.generate(**one, n=3, **options, seed=3)
    assert len({tuple(row.flatten().tolist()) for row in ids}) == 3
    # a row's draws do not depend on its neighbours, nor on how its caption is kept
    many = {name: value.expand(3, *value.shape[1:]).clone() for name, value in one.items()}
    assert torch.equal(gen.generate(**many, **options, seed=3), ids)
    assert torch.equal(gen.generate(**one, n=17, **options, seed=3)[:3], ids)
    assert torch.equal(gen.generate(**one, n=3, **options, seed=3), ids)
    assert not torch.equal(gen.generate(**one, n=3, **options, seed=4), ids)


def test_equal_prompts_are_run_once(monkeypatch):
    gen, lengths = load("ar_class"), []
    packed = type(gen).packed
    monkeypatch.setattr(
        type(gen), "packed", lambda self, ids, *rest: (lengths.append(len(ids)), packed(self, ids, *rest))[1]
    )
    options = dict(frames=2, tokens_per_frame=3, guidance=2.0)
    gen.generate(class_id=2, n=4, **options)
    gen.generate(class_id=[2, 3, 2], **options)
    gen.generate(class_id=2, prompt=[[1, 2], [1, 2], [3]], n=3, **options)
    assert lengths == [2, 3, 4]


@pytest.mark.parametrize("case", CASES)
def test_stream_gives_level_after_level(case):
    gen = load(case)
    options = dict(frames=3, tokens_per_frame=4, guidance=2.0, seed=1)
    whole = gen.generate(**conditions(case), **options)
    levels = list(gen.stream(**conditions(case), **options))
    assert [ids.shape for ids in levels] == [(3, 3, k) for k in (1, 2, 3, 4)]
    for ids in levels:
        assert torch.equal(ids, whole[..., : ids.shape[-1]])


def test_stream_with_prompts_and_stops():
    gen = load("ar_class")
    options = dict(frames=2, tokens_per_frame=[1, 4, 3], prompt=[[5], [6] * 5, [7] * 6], seed=1)
    whole = gen.generate(**conditions("ar_class"), **options)
    levels = list(gen.stream(**conditions("ar_class"), **options))
    assert [ids.shape[-1] for ids in levels] == [3, 4]
    for ids in levels:
        assert torch.equal(ids, whole[..., : ids.shape[-1]])
    assert whole[2].flatten().tolist() == [7, 7, 7, -1, 7, 7, 7, -1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", ["one weight of the head", "a caption or class", "an input"])
def test_nan_logits_are_an_error_and_no_ids(case, place):
    gen = copy.deepcopy(load(case))
    condition = {"class_id": 1} if case == "ar_class" else {"text_emb": torch.randn(3, gen.config.ctx_dim)}
    if place == "one weight of the head":
        gen.head.weight.data[5, 0] = torch.nan
    elif place == "an input":
        # from the second step on
        gen.pos_emb.data[1] = torch.nan
    elif case == "ar_class":
        gen.cls_emb.weight.data[1] = torch.nan
    else:
        gen.ctx_in.weight.data[0] = torch.inf
    for guidance in (None, 2.0):
        with pytest.raises(ValueError, match="logits are NaN"):
            gen.generate(**condition, frames=2, tokens_per_frame=2, guidance=guidance)


def test_the_caches_do_not_move_or_grow(monkeypatch):
    gen, states = load("ar_text"), []
    init = decoding.State.__init__
    monkeypatch.setattr(
        decoding.State, "__init__", lambda self, *a: (init(self, *a), states.append((self, self.k.data_ptr())))[0]
    )
    gen.generate(**conditions("ar_text"), frames=2, tokens_per_frame=5, guidance=2.0)
    ((state, address),) = states
    assert state.k.data_ptr() == address and state.k.shape == (3, 6, 3, 10, 64)
    memory = gen.memory(3, 2, 5, text_len=6)
    assert memory["cache"] == state.k.nbytes + state.v.nbytes
    assert memory["text_cache"] == sum(t.nbytes for k, v, _ in state.cross for t in (k, v))
    assert memory["weights"] == sum(p.nbytes for p in gen.parameters())
    assert memory["logits"] == 6 * 1000 * 4
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")


def test_a_row_without_caption_is_the_unconditional_row():
    gen, flat = load("ar_text"), torch.arange(8)[None]
    none = gen.logits(flat, text_emb=torch.zeros(1, 3, 48), text_mask=torch.zeros(1, 3))
    assert torch.equal(none, gen.logits(flat, unconditional=True))
    # what the mask hides does not matter, wherever it stands
    emb, mask = io("ar_text")["text_emb"][:1], torch.tensor([[1, 0, 1, 1, 0, 1]])
    want = gen.logits(flat, text_emb=emb[:, mask[0].bool()])
    got = gen.logits(flat, text_emb=emb.masked_fill(mask[..., None] == 0, 1e9), text_mask=mask)
    assert torch.equal(got, want)


class FakeCuda:
    """CUDA graphs on the CPU: a capture records the steps without running them, a replay runs them."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, _):
            pass

    class CUDAGraph:
        def replay(self):
            for call in self.calls:
                call()

    current_stream = Stream
    stream = staticmethod(lambda stream: stream)
    graph_pool_handle = staticmethod(lambda: None)
    recording = None

    @classmethod
    @contextlib.contextmanager
    def graph(cls, graph, pool):
        cls.recording = graph.calls = []
        yield
        cls.recording = None


@pytest.fixture
def captured(monkeypatch):
    """A list that gets the key of every captured step; tensors stay on the CPU, where the models say "cuda"."""
    keys, step = [], vft.Generator.step

    def recorded(self, state, *key):
        if FakeCuda.recording is None:
            return step(self, state, *key)
        keys.append(key)
        FakeCuda.recording.append(lambda: step(self, state, *key))

    monkeypatch.setattr(vft.Generator, "step", recorded)
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph_pool_handle", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda, name))
    monkeypatch.setattr(decoding, "BUCKET", 4)
    # what stream looks at says that it is a GPU, where graphs are the default
    monkeypatch.setattr(vft.Generator, "device", type("Device", (str,), {"type": "cuda"})("cpu"))
    return keys


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_same_ids(case, captured):
    gen = copy.deepcopy(load(case))
    options = dict(frames=2, tokens_per_frame=[2, 5, 5], seed=2, guidance=2.0)
    want = gen.generate(**conditions(case), **options, cuda_graph=False)
    ids = gen.generate(**conditions(case), **options)
    assert torch.equal(ids, want)
    # (samples, cache bucket): a row drops out after four tokens, the cache is ten long
    assert captured == [(3, 4), (2, 8), (2, 10)]


@pytest.mark.parametrize("case", CASES)
def test_graphs_are_kept_for_calls_of_one_shape(case, captured):
    gen = copy.deepcopy(load(case))
    options, other = dict(frames=2, tokens_per_frame=4), {n: v.flip(0) for n, v in conditions(case).items()}
    runs = [
        (conditions(case), dict(seed=2, guidance=2.0)),
        (other, dict(seed=3, guidance=2.0)),
        (conditions(case), dict(seed=2, guidance=2.0, prompt=[[1] * 3, [], [2]])),
    ]
    want = [gen.generate(**condition, **options, **more, cuda_graph=False) for condition, more in runs]
    assert captured == []
    first = gen.generate(**runs[0][0], **options, **runs[0][1])
    count = len(captured)
    got = [first] + [gen.generate(**condition, **options, **more) for condition, more in runs[1:]]
    # what was given stays as it is; rows that drop out by other prompts are another number of samples
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert count == 2 and captured[count:] == [(2, 8), (1, 8)]
    # two runs at a time have a state each
    streams = [gen.stream(**condition, **options, **more) for condition, more in runs[:2]]
    both = [[ids] for ids in map(next, streams)]
    for ids in zip(*streams, strict=True):
        for seen, each in zip(both, ids, strict=True):
            seen.append(each)
    # and what they gave outlives the next run in their buffers
    gen.generate(**runs[2][0], **options, **runs[2][1])
    for seen, ids in zip(both, want, strict=False):
        assert all(torch.equal(each, ids[..., : each.shape[-1]]) for each in seen)
    # another setting of the sampler is another graph, and so are other weights
    count = len(captured)
    gen.generate(**conditions(case), **options, guidance=2.0, temperature=0)
    assert len(captured) == count + 2
    gen.head.weight = torch.nn.Parameter(gen.head.weight.flip(0), requires_grad=False)
    changed = gen.generate(**conditions(case), **options, guidance=2.0, temperature=0)
    assert len(captured) == count + 4
    wanted = gen.generate(**conditions(case), **options, guidance=2.0, temperature=0, cuda_graph=False)
    assert torch.equal(changed, wanted) and len(gen.replays._kept) == 2
    # a copy has other weights, and keeps nothing
    assert not copy.deepcopy(gen).replays._kept


def test_kept_graphs_do_not_keep_their_model(captured):
    gen = copy.deepcopy(load("ar_class"))
    gen.generate(1, frames=1, tokens_per_frame=3)
    seen = weakref.ref(gen)
    assert captured
    # what the stand-in records holds the model; a graph does not
    for _, graphs in gen.replays._kept.values():
        graphs.graphs.clear()
    gc.disable()
    try:
        del gen, graphs
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(case):
    gen, flat = load(case, dtype=torch.bfloat16), io(case)["greedy_ids_cfg1.0"]
    want = load(case).logits(flat, **conditions(case))
    got = gen.logits(flat, **conditions(case))
    assert got.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 0.02
    ids = gen.generate(**conditions(case), frames=2, tokens_per_frame=3, guidance=2.0)
    assert ids.shape == (3, 2, 3) and ids.min() >= 0 and ids.max() < 1000


@pytest.mark.parametrize("case", CASES)
def test_int8_weights(case):
    gen, dense = load(case, weights="int8"), load(case)
    flat = io(case)["greedy_ids_cfg1.0"]
    want, got = dense.logits(flat, **conditions(case)), gen.logits(flat, **conditions(case))
    assert (got - want).norm() / want.norm() < 0.035
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.9
    matrices = sum(m.weight.numel() for m in gen.modules() if isinstance(m, vft.generator.Linear))
    assert gen.memory(1, 1, 1)["weights"] < dense.memory(1, 1, 1)["weights"] - 2.9 * matrices
    # the step and the packed pass agree
    ids = gen.generate(**conditions(case), frames=2, tokens_per_frame=4, temperature=0)
    assert torch.equal(gen.logits(vft.time_first(ids), **conditions(case)).argmax(-1), vft.time_first(ids))
    with pytest.raises(ValueError, match="int8 weights cannot be saved"):
        gen.save("unused")


@pytest.mark.parametrize("case", CASES)
def test_fp8_weights(case):
    gen, dense = load(case, weights="fp8"), load(case)
    flat = io(case)["greedy_ids_cfg1.0"]
    want, got = dense.logits(flat, **conditions(case)), gen.logits(flat, **conditions(case))
    error, agree = (got - want).norm() / want.norm(), (got.argmax(-1) == want.argmax(-1)).float().mean()
    assert 0.05 < error < 0.2 and agree > 0.65, (error, agree)
    assert gen.memory(1, 1, 1)["weights"] == load(case, weights="int8").memory(1, 1, 1)["weights"]
    # rows alone, among others, and in a session
    options = dict(frames=2, tokens_per_frame=4, seed=1, guidance=2.0)
    ids = gen.generate(**conditions(case), **options)
    session = gen.session(4)
    session.add(**conditions(case, slice(0, 1)), **options)
    while session.waiting or session.running:
        session.step()
    assert torch.equal(session.finished()[0][1], ids[0])
    with pytest.raises(ValueError, match="fp8 weights cannot be saved"):
        gen.save("unused")


def test_fp8_where_it_is_not_multiplied(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"weights 'fp8' needs a GPU of compute capability 8\.9, got 8\.0"):
        load("ar_class", weights="fp8", device="cuda")
    with pytest.raises(ValueError, match="weights must be None, 'int8' or 'fp8', got 'fp4'"):
        load("ar_class", weights="fp4")


def test_fp8_products_are_scaled_ones(monkeypatch):
    layer = vft.generator.Linear(48, 32, bias=True)
    layer.bias.data.normal_()
    layer.quantize("fp8")
    x, residual = torch.randn(5, 48).bfloat16(), torch.randn(5, 16).bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.shape == (5, 1) and scale_b.shape == (1, 32)
        calls.append(b.shape)
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    with torch.no_grad():
        want = layer(x, residual, "swiglu")
        # a GPU in what the layer looks at
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
        real = torch.Tensor.device.__get__
        device = type("Device", (), {"type": "cuda"})()
        monkeypatch.setattr(torch.Tensor, "device", property(lambda t: device if t is x else real(t)))
        got = layer(x, residual, "swiglu")
    assert calls == [(48, 32)]
    assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_round_trip_under_published_names(case, tmp_path):
    gen = load(case)
    gen.save(tmp_path / "one.safetensors")
    stored, want = load_file(tmp_path / "one.safetensors"), load_file(GENERATORS / case / "model.safetensors")
    assert stored.keys() == want.keys()
    assert all(torch.equal(stored[name], want[name]) for name in want)
    again = vft.Generator.from_pretrained(tmp_path / "one.safetensors")
    assert again.config == gen.config and again.classes == gen.classes and again.tokenizer == "golden"


@pytest.fixture
def folder(tmp_path):
    shutil.copy(GENERATORS / "ar_class" / "config.json", tmp_path)
    shutil.copy(GENERATORS / "ar_class" / "model.safetensors", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ffn.w3.weight"), r"lacks the key blocks.1.ffn.w3.weight \(1 missing"),
        (lambda t: t.update(extra=torch.zeros(1)), r"has the unknown key extra \(1 in all\)"),
        (lambda t: t.update(sos=torch.zeros(3)), r"sos must have shape \[192\], got \[3\]"),
        (lambda t: t.update(sos=torch.zeros(192).int()), "sos must be floating point"),
    ],
)
def test_bad_tensors(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        vft.Generator.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": None}, "must have the field 'depth'"),
        ({"depth": 0}, "depth must be an int of at least 1, got 0"),
        ({"depth": "3"}, "depth must be an int of at least 1, got '3'"),
        ({"n_classes": 0, "classes": []}, "n_classes must be an int of at least 1"),
        ({"rope": True}, "unknown field 'rope'"),
        ({"cond": "audio"}, "cond must be 'class' or 'text', got 'audio'"),
        ({"cond": "text"}, "ctx_dim must be an int of at least 1, got 0"),
        ({"classes": ["a"]}, "classes must hold n_classes = 7 names, got 1"),
        ({"classes": "abc"}, "classes must be a list of names"),
        ({"head_bias": 1}, "head_bias must be true or false"),
        ({"tokenizer": {}}, "tokenizer must be a string"),
        ({"head_bias": True}, "lacks the key head.bias"),
    ],
)
def test_bad_configs(folder, change, message):
    raw = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        vft.Generator.from_pretrained(folder)


def test_a_tokenizer_is_no_generator():
    with pytest.raises(vft.ConfigError, match="the generator's config must have the field 'depth'"):
        vft.Generator.from_pretrained(checkpoint.ASSETS / "tiny.safetensors")


def test_real_sizes():
    config = parse_generator_config({"depth": 10, "vocab": 64000, "seq_len": 1280, "cond": "class", "n_classes": 600})
    assert (config.width, config.heads, config.hidden) == (640, 10, 1728)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "class_id must be given"),
        ({"class_id": 7}, "class_id must lie in 0..6, got 7"),
        ({"class_id": -1}, "class_id must lie in 0..6, got -1"),
        ({"class_id": 1.5}, "not iterable|class_id must"),
        ({"class_id": torch.zeros(2)}, "class_id must be int"),
        ({"class_id": "clas 2"}, "class 'clas 2' is not known: did you mean 'class 2'"),
        ({"class_id": "zebra"}, "class 'zebra' is not known: the classes are class 0, class 1, .*, class 6$"),
        (
            {"class_id": 1, "text_emb": torch.zeros(1, 2, 48)},
            "text_emb must not be given: this model is conditioned on",
        ),
        ({"class_id": [1, 2], "n": 3}, "must hold 1 or n = 3 rows, got 2"),
        ({"class_id": 1, "n": -1}, "n must be an int of at least 0"),
        ({"class_id": 1, "frames": 0}, "frames must be at least 1, got 0"),
        ({"class_id": 1, "tokens_per_frame": 0}, "tokens_per_frame must be at least 1, got 0"),
        ({"class_id": 1, "tokens_per_frame": [1, 2]}, r"one a row \(1\), got 2"),
        ({"class_id": 1, "frames": 9, "tokens_per_frame": 9}, r"at most seq_len = 80, got 9 \* 9"),
        ({"class_id": 1, "temperature": -1}, "temperature must be at least 0, got -1"),
        ({"class_id": 1, "temperature": None}, "temperature must be a number"),
        ({"class_id": 1, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"class_id": 1, "top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"class_id": 1, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"class_id": 1, "min_p": 1}, "min_p must be at least 0 and below 1, got 1"),
        ({"class_id": 1, "guidance": float("nan")}, "guidance must be finite, got nan"),
        ({"class_id": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"class_id": 1, "prompt": [[1], [2]]}, r"one a row \(1\), got 2"),
        ({"class_id": 1, "prompt": [[1000]]}, "prompt must lie in 0..999, got 1000"),
        ({"class_id": 1, "prompt": [[0.5]]}, "prompt must be int"),
        ({"class_id": 1, "prompt": [[1] * 6], "frames": 1, "tokens_per_frame": 5}, "at most .* = 5 tokens, got 6"),
        ({"class_id": 1, "cuda_graph": True}, "cuda_graph must be off on cpu"),
    ],
)
def test_bad_requests(options, message):
    for call in (load("ar_class").generate, load("ar_class").stream):
        with pytest.raises((TypeError, ValueError), match=message):
            call(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text_emb must be given"),
        ({"class_id": 1}, "class_id must not be given: this model is conditioned on text"),
        ({"text_emb": torch.zeros(1, 2, 47)}, r"text_emb must have \[c, 48\] a row, got \[2, 47\]"),
        ({"text_emb": torch.zeros(1, 2, 48).int()}, "text_emb must be floating-point"),
        ({"text_emb": torch.full((1, 2, 48), float("nan"))}, "text_emb must be finite"),
        ({"text_emb": torch.zeros(1, 2, 48), "text_mask": torch.ones(1, 3)}, "text_mask must have 2 entries a row"),
        ({"text_emb": torch.zeros(1, 2, 48), "text_mask": torch.ones(2, 2)}, "text_mask must have 1 rows"),
    ],
)
def test_bad_text(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load("ar_text").generate(**options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, 81).long(), {}, r"flat_ids must have shape \[n, L\] with L <= 80, got \[1, 81\]"),
        (torch.zeros(4).long(), {}, "flat_ids must have shape"),
        (torch.zeros(1, 4), {}, "flat_ids must be int64 or int32"),
        (torch.full((1, 4), 1000), {}, "flat_ids must lie in 0..999, got 1000"),
        (torch.zeros(1, 4).long(), {"unconditional": True}, "must not be given with unconditional"),
    ],
)
def test_bad_flat_ids(ids, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load("ar_class").logits(ids, 1, **options)


def test_generate_shows_the_arguments_of_stream():
    shown, called = inspect.signature(vft.Generator.generate), inspect.signature(vft.Generator.stream)
    assert shown.parameters == called.parameters and "cuda_graph" in shown.parameters
    assert shown.return_annotation == "torch.Tensor"


def test_nothing_asked_for():
    gen = load("ar_class")
    assert gen.generate(class_id=1, n=0, frames=2, tokens_per_frame=3).shape == (0, 2, 3)
    assert gen.generate(class_id=[], frames=2, tokens_per_frame=3).shape == (0, 2, 3)
    assert gen.logits(torch.zeros(2, 0).long(), 1).shape == (2, 0, 1000)
    assert gen.generate(class_id=1).shape == (1, 5, 16)


def test_class_names_and_indices():
    gen, options = load("ar_class"), dict(frames=2, tokens_per_frame=2, temperature=0)
    want = gen.generate(class_id=torch.tensor([3, 1]), **options)
    assert torch.equal(gen.generate(class_id=["class 3", 1], **options), want)
    assert torch.equal(gen.generate(class_id="class 3", **options), want[:1])


def test_time_first():
    ids = torch.tensor([[[1, 2, 3], [4, 5, 6]]])
    assert vft.time_first(ids).tolist() == [[1, 4, 2, 5, 3, 6]]


def test_gradients_reach_every_parameter():
    raw = dict(depth=2, vocab=50, seq_len=12, cond="text", ctx_dim=6, n_ctx_null=2)
    gen = vft.Generator(parse_generator_config(raw))
    conditions = [torch.randn(3, 6), None]
    ids = torch.randint(50, (2, 12))
    torch.nn.functional.cross_entropy(gen.teacher_forced(ids, conditions).flatten(0, 1), ids.flatten()).backward()
    unused = [name for name, p in gen.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import called_ops

import flexkernels

diffusers = pytest.importorskip("diffusers")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
from flexkernels.integrations.diffusers import attention, attention_backend  # noqa: E402

Scheduler = diffusers.FlowMatchEulerDiscreteScheduler


def pair(steps=6, **config):
    schedulers = [Scheduler(shift=3.0, **config) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers[0], flexkernels.accelerate(schedulers[1])


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 37, 16), (2, 3, 5, 4, 4), (7,)], ids=str)
def test_a_whole_schedule_in_float32(shape):
    original, ours = pair()
    x = y = torch.randn(shape)
    for t in original.timesteps:
        v = torch.randn(shape)
        x, (y,) = original.step(v, t, x).prev_sample, ours.step(v, t, y, return_dict=False)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    assert ours.step_index == original.step_index == 6


@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_rounding(sample_dtype, dtype):
    original, ours = pair()
    x, v = torch.randn(2, 4, 8, 8).to(sample_dtype), torch.randn(2, 4, 8, 8).to(dtype)
    theirs, got = (s.step(v, s.timesteps[0], x).prev_sample for s in (original, ours))
    exact = x.double() + (ours.sigmas[1] - ours.sigmas[0]).double() * v.double()
    assert got.dtype == theirs.dtype == dtype
    # rounded once, so no further from the exact sum than the original
    assert (got.double() - exact).abs().max() <= (theirs.double() - exact).abs().max() + 1e-7
    torch.testing.assert_close(got, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_really_runs_the_kernel(monkeypatch):
    _, ours = pair()
    calls = called_ops(monkeypatch)
    ours.step(torch.randn(2, 5, 4), ours.timesteps[0], torch.randn(2, 5, 4))
    assert calls == ["flow_update"]


def test_gradient():
    original, ours = pair()
    grads = []
    for scheduler in (original, ours):
        torch.manual_seed(0)
        x, v = (torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(2))
        scheduler.step(v, scheduler.timesteps[0], x).prev_sample.square().sum().backward()
        grads.append((x.grad, v.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_what_is_left_is_the_original_bit_by_bit():
    x, v = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    original, ours = pair(stochastic_sampling=True)
    drawn = [s.step(v, s.timesteps[0], x, generator=torch.Generator().manual_seed(1)) for s in (original, ours)]
    assert torch.equal(drawn[0].prev_sample, drawn[1].prev_sample)
    original, ours = pair()
    times = original.timesteps[torch.randint(6, (2, 5))]
    for settings in (dict(per_token_timesteps=times), dict()):
        wide = [s.step(v.double(), s.timesteps[0], x.double(), **settings).prev_sample for s in (original, ours)]
        assert torch.equal(*wide)
    assert ours.step_index == original.step_index == 2
    with pytest.raises(ValueError, match="Passing integer indices"):
        ours.step(v, 3, x)


def test_a_new_schedule_is_noticed():
    _, ours = pair()
    x = torch.randn(2, 5, 4)
    for steps in (6, 3):
        ours.set_timesteps(steps)
        got = ours.step(torch.ones_like(x), ours.timesteps[0], x).prev_sample
        torch.testing.assert_close(got, x + (ours.sigmas[1] - ours.sigmas[0]))
    ours.set_timesteps(4)
    ours.sigmas.mul_(0.5)
    got = ours.step(torch.ones_like(x), ours.timesteps[0], x).prev_sample
    torch.testing.assert_close(got, x + (ours.sigmas[1] - ours.sigmas[0]))


@torch.inference_mode()
def test_schedules_made_in_inference_mode():
    _, ours = pair()
    x = torch.randn(2, 5, 4)
    for i, t in enumerate(ours.timesteps):
        got = ours.step(torch.ones_like(x), t, x).prev_sample
        torch.testing.assert_close(got, x + (ours.sigmas[i + 1] - ours.sigmas[i]))


def test_restore_and_twice_and_signature():
    _, ours = pair()
    assert (
        inspect.signature(ours.step).parameters.keys() == inspect.signature(Scheduler(shift=1.0).step).parameters.keys()
    )
    assert flexkernels.accelerate(ours) is ours
    twin = copy.deepcopy(ours)
    assert twin.step.__self__ is twin
    flexkernels.restore(ours)
    assert type(ours) is Scheduler and ours.step.__func__ is Scheduler.step


def saved(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved])
def test_copies_and_pickles(again):
    original, ours = pair()
    twin = again(ours)
    assert isinstance(twin, Scheduler) and type(twin) is not Scheduler
    x, v = torch.randn(2, 2, 5, 4)
    twin.step(v, twin.timesteps[0], x)
    # its own steps are counted
    assert (twin.step_index, ours.step_index) == (1, None)
    want = original.step(v, original.timesteps[0], x).prev_sample
    torch.testing.assert_close(ours.step(v, ours.timesteps[0], x).prev_sample, want)
    flexkernels.restore(twin)
    assert type(twin) is Scheduler and type(ours) is not Scheduler


def test_pipelines_and_subclasses(caplog):
    Pipeline = type("Pipeline", (diffusers.DiffusionPipeline,), {"__init__": lambda self: None})
    pipeline = Pipeline()
    object.__setattr__(pipeline, "scheduler", Scheduler())
    flexkernels.accelerate(pipeline)
    assert pipeline.scheduler.step.__func__ is not Scheduler.step
    flexkernels.restore(pipeline)
    assert type(pipeline.scheduler) is Scheduler

    class Mine(Scheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    mine = flexkernels.accelerate(Mine())
    assert "step" not in vars(mine)
    with pytest.raises(TypeError, match="options of diffusers must be among none, got fast"):
        flexkernels.accelerate(Scheduler(), fast=True)


def reference(q, k, v, **settings):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **settings).transpose(1, 2)


def draw(batch=2, length=9, keys=9, heads=4, kv_heads=4, head_dim=16):
    shapes = [(batch, length, heads, head_dim)] + 2 * [(batch, keys, kv_heads, head_dim)]
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize(
    "sizes, settings",
    [
        (dict(), dict()),
        (dict(), dict(is_causal=True, scale=0.3)),
        (dict(length=5), dict(is_causal=True)),
        (dict(keys=13), dict()),
        (dict(kv_heads=2), dict(enable_gqa=True)),
    ],
    ids=str,
)
def test_attention_through_the_dispatcher(sizes, settings):
    q, k, v = draw(**sizes)
    before = dispatch._AttentionBackendRegistry.get_active_backend()
    with attention_backend():
        assert dispatch._AttentionBackendRegistry.get_active_backend()[1] is attention
        got = dispatch.dispatch_attention_fn(q, k, v, **settings)
    assert dispatch._AttentionBackendRegistry.get_active_backend() == before
    torch.testing.assert_close(got, reference(q, k, v, **settings))


def test_attention_with_padding():
    q, k, v = draw(keys=12)
    mask = torch.arange(12) < torch.tensor([[12], [5]])
    for shape in ((2, 12), (2, 1, 1, 12)):
        with attention_backend():
            got = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask.view(shape))
        torch.testing.assert_close(got, reference(q, k, v, attn_mask=mask[:, None, None]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dropout_p=0.1), "dropout_p must be 0"),
        (dict(attn_mask=torch.zeros(2, 1, 9, 9)), r"must be a bool mask of keys, .*, got float32 \[2, 1, 9, 9\]"),
        (dict(attn_mask=torch.ones(2, 9, dtype=torch.bool), is_causal=True), "attn_mask must be None with is_causal"),
        (dict(_parallel_config=object()), "_parallel_config must be None"),
    ],
)  # fmt: skip
def test_attention_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        attention(*draw(), **settings)
    with pytest.raises(ValueError, match="key must have 4 heads like query without enable_gqa, got 2 heads"):
        attention(*draw(kv_heads=2))
    with pytest.raises(ValueError, match="query must be no longer than key, 4, with is_causal, got 9"):
        attention(*draw(keys=4), is_causal=True)

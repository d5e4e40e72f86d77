"""diffusers: `FlowMatchEulerDiscreteScheduler.step` as one fused update, and attention for its dispatcher."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import checks
from . import Change, is_a
from . import accelerate as accelerate_again
from ._attention import dense_attention, key_padding
from ._update import unguided_update

SCHEDULER = "diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler"
PIPELINE = "diffusers.pipelines.pipeline_utils.DiffusionPipeline"
BACKEND = "flexkernels"

# a schedule's sigmas -> (their version, the step from each to the next); an entry goes when its tensor does
_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def knows(model: Any) -> bool:
    return is_a(model, SCHEDULER) or (is_a(model, PIPELINE) and is_a(getattr(model, "scheduler", None), SCHEDULER))


def accelerate(model: Any) -> Change:
    """Replaces `step` of a `FlowMatchEulerDiscreteScheduler`, or of the scheduler of a pipeline.

    prev_sample is sample + (sigma_next - sigma) * model_output in float32, rounded once to model_output's dtype. The
    original rounds the product to that dtype before the addition, so float32 results differ in the last bit and low
    precisions by that rounding. Left to the original: stochastic sampling, per_token_timesteps, float64, tensors that
    are broadcast, and integer timesteps, which it refuses.
    """
    scheduler = model if is_a(model, SCHEDULER) else model.scheduler
    original = next(base for base in type(scheduler).__mro__ if f"{base.__module__}.{base.__qualname__}" == SCHEDULER)
    before = type(scheduler)
    if "step" in vars(scheduler) or before.step is not original.step:
        return Change([], [f"{before.__name__} (step is not the package's own)"], lambda: None)
    scheduler.__class__ = _accelerated(before)
    # a strong reference here would keep the scheduler alive for ever
    own = weakref.ref(scheduler)
    return Change(
        [f"{before.__name__}.step"],
        ["stochastic sampling", "per_token_timesteps", "float64"],
        lambda: setattr(own(), "__class__", before),
    )


@functools.cache
def _accelerated(published: type) -> type:
    members = {"__module__": published.__module__, "__qualname__": published.__qualname__}
    return type(published.__name__, (_Accelerated, published), members)


def _revived(published: type):
    return accelerate_again(published.__new__(published))


class _Accelerated:
    """Stands before a published scheduler class. Copies and pickles are accelerated too, and can be restored."""

    def __reduce_ex__(self, protocol):
        return _revived, (type(self).__bases__[1],), vars(self)

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        per_token_timesteps=None,
        return_dict=True,
    ):
        if per_token_timesteps is not None or not _served(self, model_output, timestep, sample):
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps,
                return_dict,
            )  # fmt: skip
        if self.step_index is None:
            self._init_step_index(timestep)
        dt = _time_step(self.sigmas, self.step_index)
        x = sample if sample.dtype == model_output.dtype else sample.float()
        prev_sample = unguided_update(x, model_output, dt).to(model_output.dtype)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        package = sys.modules[SCHEDULER.rpartition(".")[0]]
        return package.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)


def _served(scheduler, model_output, timestep, sample) -> bool:
    if isinstance(timestep, (int, torch.IntTensor, torch.LongTensor)) or scheduler.config.stochastic_sampling:
        return False
    alike = sample.shape == model_output.shape and sample.device == model_output.device
    return alike and sample.dtype in checks.FLOATS and model_output.dtype in checks.FLOATS


def _time_step(sigmas: torch.Tensor, index: int) -> float:
    """From sigma `index` to the next, on the host; a schedule is read once (on a GPU that waits for it)."""
    if sigmas.is_inference():
        # has no version that would tell of a change
        return (sigmas[index + 1] - sigmas[index]).item()
    kept = _steps.get(sigmas)
    if kept is None or kept[0] != sigmas._version:
        kept = _steps[sigmas] = (sigmas._version, sigmas.diff().tolist())
    return kept[1][index]


@contextlib.contextmanager
def attention_backend() -> Iterator[None]:
    """Within it, diffusers' attention goes through :func:`attention`.

    diffusers' own `attention_backend` and `set_attention_backend` take names of its enumeration alone, so this sets
    the active backend of its registry. Models that were given a backend of their own keep that.
    """
    import diffusers.models.attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    registry.register(BACKEND)(attention)
    before, _ = registry.get_active_backend()
    registry.set_active_backend(BACKEND)
    try:
        yield
    finally:
        registry.set_active_backend(before)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Full or causal attention with the signature of a diffusers backend.

    query: ``[batch, length, heads, head_dim]``; key, value: ``[batch, key_length, kv_heads, head_dim]``, fewer heads
    with enable_gqa. attn_mask: None, or bool ``[batch, key_length]`` or ``[batch, 1, 1, key_length]``, True for keys
    that are seen; its values are read by the host. is_causal: query i sees the keys up to i.

    Returns ``[batch, length, heads, head_dim]``; where a sample sees no key, zeros. Raises ValueError for dropout,
    another mask, context parallelism, unequal heads without enable_gqa, or more causal queries than keys.
    """
    if dropout_p:
        checks.reject("dropout_p", "be 0, as nothing else is supported", dropout_p)
    if _parallel_config is not None:
        checks.reject("_parallel_config", "be None, as context parallelism is not supported", "one")
    if query.shape[2] != key.shape[2] and not enable_gqa:
        checks.reject("key", f"have {query.shape[2]} heads like query without enable_gqa", f"{key.shape[2]} heads")
    length = query.shape[1]
    if is_causal:
        if attn_mask is not None:
            checks.reject("attn_mask", "be None with is_causal", "a mask")
        if length > key.shape[1]:
            checks.reject("query", f"be no longer than key, {key.shape[1]}, with is_causal", length)
        # counted from the first key; the kernels count from the last
        key, value = key[:, :length], value[:, :length]
    padding = None if attn_mask is None else key_padding("attn_mask", attn_mask, key)
    return dense_attention(query, key, value, is_causal, padding, scale)

"""The flow-ODE sampler: integrates dx/dt = v from noise (t = 1) to clean latents (t = 0), guided.

Every step is one :func:`flexkernels.flow_step` over all samples; samples may differ in shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, islice, pairwise

import torch

import flexkernels
from flexkernels import APG, CFG

SOLVERS = ("euler",)
COMPAT = ("shared_momentum",)
PREFIX_MODES = ("clean", "sdedit")


def schedule(steps: int) -> list[float]:
    """Uniform times from 1 to 0, ``steps + 1`` of them (the published schedule)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    return [1 - i / steps for i in range(steps)] + [0.0]


def sample(
    velocity: Callable[[list[torch.Tensor], float, bool], tuple[list[torch.Tensor], list[torch.Tensor] | None]],
    noise: Sequence[torch.Tensor],
    *,
    steps: int,
    guidance: CFG | APG | None = None,
    solver: str = "euler",
    prefix: Sequence[torch.Tensor] | None = None,
    prefix_mode: str = "clean",
    compat: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Euler's method on the guided velocity.

    Args:
        velocity: ``velocity(x, t, guided)`` -> (conditional, unconditional or None) velocities, lists like x.
        noise: list of float32 ``[C, T, H, W]``, the state at t = 1.
        steps: number of Euler steps, uniform in t.
        guidance: None, CFG or APG; its scale may be a function of t. A scale of 1 skips the unconditional pass.
        prefix: clean latents ``[C, k, H, W]`` of the first frames, one a sample.
        prefix_mode: ``"clean"`` keeps those frames clean at every t; ``"sdedit"`` noises them to each step's t and
            leaves the last step's result.
        compat: ``"shared_momentum"`` hands one momentum buffer from sample to sample, as published code does.
        progress: called with the number of steps done after each.

    Returns:
        The latents at t = 0, list of float32 ``[C, T, H, W]``.

    Raises:
        ValueError: an unknown solver, prefix mode or compat name, or steps below 1.
    """
    _check(solver, prefix_mode, compat)
    prefix = [None] * len(noise) if prefix is None else prefix
    if "shared_momentum" in compat:
        if len({x.shape for x in noise}) > 1:
            raise ValueError("compat shared_momentum needs samples of one shape, as the published code does")
        states = [_State([x], [p], prefix_mode) for x, p in zip(noise, prefix, strict=True)]
    else:
        states = [_State(noise, prefix, prefix_mode)]
    times = schedule(steps)
    momentum = None
    for i, (t, t_next) in enumerate(pairwise(times)):
        now = resolve(guidance, t)
        x = [sample for state in states for sample in state.samples()]
        conditional, unconditional = (iter(v or ()) for v in velocity(x, t, now is not None))
        for state in states:
            momentum = state.step(conditional, unconditional, now, momentum, t, t_next)
        if progress is not None:
            progress(i + 1)
    return [sample for state in states for sample in state.samples()]


def resolve(guidance: CFG | APG | None, t: float) -> CFG | APG | None:
    """The guidance at time t, its scale a number; None where it is off (scale 1)."""
    if guidance is None:
        return None
    scale = float(guidance.scale(t)) if callable(guidance.scale) else guidance.scale
    return None if scale == 1.0 else replace(guidance, scale=scale)


def _check(solver: str, prefix_mode: str, compat: Sequence[str]) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if prefix_mode not in PREFIX_MODES:
        raise ValueError(f"prefix_mode must be one of {', '.join(PREFIX_MODES)}, got {prefix_mode!r}")
    unknown = set(compat) - set(COMPAT)
    if unknown:
        raise ValueError(f"compat must be among {', '.join(COMPAT)}, got {sorted(unknown)}")


class _State:
    """Samples that take their steps together, in one flat buffer; a row is one channel of one sample."""

    def __init__(self, noise, prefix, prefix_mode: str) -> None:
        self.shapes = [x.shape for x in noise]
        self.x = _flat(noise)
        self.offsets = _row_offsets(self.shapes, self.x.device)
        self.noised = prefix_mode == "sdedit"
        self.prefix = None
        if prefix[0] is None:
            return
        frames = [p.shape[1] for p in prefix]
        self.prefix = _flat(prefix).float()
        self.prefix_noise = _flat([x[:, :k] for x, k in zip(noise, frames, strict=True)]) if self.noised else None
        self.prefix_offsets = _row_offsets([p.shape for p in prefix], self.x.device)
        if not self.noised:
            for x, p, k in zip(self.samples(), prefix, frames, strict=True):
                x[:, :k] = p

    def samples(self) -> list[torch.Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [x.view(shape) for x, shape in zip(self.x.split(sizes), self.shapes, strict=True)]

    def step(self, conditional, unconditional, guidance, momentum, t: float, t_next: float):
        """Takes this state's velocities from the two iterators and moves it to t_next; returns the momentum buffer."""
        overwrite = {}
        if self.prefix is not None and not (self.noised and t_next == 0.0):
            overwrite = {"prefix": self.prefix, "prefix_offsets": self.prefix_offsets}
            if self.noised:
                overwrite |= {"prefix_noise": self.prefix_noise, "prefix_time": t_next}
        count = len(self.shapes)
        self.x, momentum = flexkernels.flow_step(
            self.x,
            _flat(islice(conditional, count)),
            _flat(islice(unconditional, count)) if guidance is not None else None,
            dt=t_next - t,
            guidance=guidance,
            momentum_buffer=momentum,
            row_offsets=self.offsets,
            **overwrite,
        )
        return momentum


def _flat(samples: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in samples])


def _row_offsets(shapes, device) -> torch.Tensor:
    lengths = [shape[1:].numel() for shape in shapes for _ in range(shape[0])]
    return torch.tensor([0, *accumulate(lengths)], device=device)

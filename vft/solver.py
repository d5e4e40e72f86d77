"""The flow-ODE sampler: integrates dx/dt = v from noise (t = 1) to clean latents (t = 0), guided.

Every evaluation of the velocity is followed by one :func:`flexkernels.flow_update` over all samples, which may differ
in shape: guidance, the solver's sum and the conditioning frames in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import torch

import flexkernels
from flexkernels import APG, CFG, Prefix, solvers

# velocities that a step of each solver evaluates; the first step of ab3 evaluates two
SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1, "ab3": 1, "dpm2m": 1}
_TABLEAUS = {"euler": solvers.EULER, "midpoint": solvers.MIDPOINT, "heun": solvers.HEUN, "rk4": solvers.RK4}
COMPAT = ("shared_momentum",)
PREFIX_MODES = ("clean", "sdedit")

Velocity = Callable[[list[torch.Tensor], int, bool], tuple[list[torch.Tensor], list[torch.Tensor] | None]]


def schedule(steps: int | Sequence[float], shift: float = 1.0) -> list[float]:
    """Times from 1 to 0: uniform ones (the published schedule), shifted ones, or a given list.

    Args:
        steps: number of steps, or the times themselves, falling strictly from 1 to 0.
        shift: s maps a uniform t to s t / (1 + (s - 1) t); above 1, more of the steps are spent on strong noise
            (arXiv 2403.03206, section 5.3.2).

    Raises:
        ValueError: fewer than one step, a shift that is not positive, or times that do not fall from 1 to 0.
    """
    if not isinstance(shift, (int, float)) or not 0 < shift < float("inf"):
        raise ValueError(f"shift must be a positive number, got {shift!r}")
    if not isinstance(steps, int):
        times = [float(t) for t in steps]
        if len(times) < 2 or times[0] != 1 or times[-1] != 0 or any(b >= a for a, b in pairwise(times)):
            raise ValueError(f"steps must be a number or times that fall strictly from 1 to 0, got {times}")
        return times
    if isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    uniform = [1 - i / steps for i in range(steps)] + [0.0]
    return uniform if shift == 1 else [shift * t / (1 + (shift - 1) * t) for t in uniform]


class Evaluation(NamedTuple):
    """One velocity of a solver, at time t, and the update that follows it.

    step: its coefficients; t_next: the time that its result belongs to; last: whether it ends a step of the solver;
    keep: which velocities the next evaluation looks back at, as places among those it was given itself and its own.
    """

    t: float
    step: solvers.Step
    t_next: float
    last: bool
    keep: tuple[int, ...]


def evaluations(solver: str, times: Sequence[float]) -> list[Evaluation]:
    """All evaluations of a solver over a schedule, in order.

    Raises ValueError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    found = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        if solver in _TABLEAUS:
            found += _runge_kutta(_TABLEAUS[solver], t, t_next)
        elif solver == "dpm2m":
            step = solvers.dpm2m(t, t_next, times[i - 1] if i else None)
            found.append(Evaluation(t, step, t_next, last=True, keep=(int(i > 0),)))
        else:
            found += _adams_bashforth(int(solver[-1]) - 1, times, i)
    return found


def _adams_bashforth(back: int, times: Sequence[float], i: int) -> list[Evaluation]:
    """Step i, which looks at most `back` steps back."""
    if back > 1 and i == 0:
        # an Euler step here would cost the method its third order
        first, second = _runge_kutta(solvers.HEUN, *times[:2])
        return [first, second._replace(keep=(0,))]
    step = solvers.adams_bashforth(times[max(0, i - back) : i + 2])
    keep = range(len(step.past_b) + 1)[-back:]
    return [Evaluation(times[i], step, times[i + 1], last=True, keep=tuple(keep))]


def _runge_kutta(tableau: solvers.Tableau, t: float, t_next: float) -> list[Evaluation]:
    steps = solvers.runge_kutta(tableau, t_next - t)
    at = [t + step.at * (t_next - t) for step in steps]
    *stages, end = [
        Evaluation(at[j], step, (*at, t_next)[j + 1], last=False, keep=tuple(range(j + 1)))
        for j, step in enumerate(steps)
    ]
    return [*stages, end._replace(last=True, keep=())]


def sample(
    velocity: Velocity,
    noise: Sequence[torch.Tensor],
    plan: Sequence[Evaluation],
    *,
    guidance: CFG | APG | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
    prefix_mode: str = "clean",
    compat: Sequence[str] = (),
    null_every: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Integrates the guided velocity.

    Args:
        velocity: ``velocity(x, i, guided)`` -> (conditional, unconditional or None) velocities of the plan's evaluation
            i, lists like x.
        noise: list of float32 ``[C, T, H, W]``, the state at t = 1.
        plan: what :func:`evaluations` gives.
        guidance: None, CFG or APG; its scale may be a function of t. A scale of 1 skips the unconditional pass.
        prefix: clean latents ``[C, k, H, W]`` of the first frames, one a sample.
        prefix_mode: ``"clean"`` keeps those frames clean at every t; ``"sdedit"`` noises them to each evaluation's t
            and leaves the last step's result.
        compat: ``"shared_momentum"`` hands one momentum buffer from sample to sample, as published code does.
        null_every: the unconditional velocity is computed in every so many guided evaluations; in those between, it is
            the conditional one less what both last differed by. 1 computes all.
        progress: called with the number of steps done after each.

    Returns:
        The latents at t = 0, list of float32 ``[C, T, H, W]``.

    Raises:
        ValueError: an unknown prefix mode or compat name, or null_every below 1.
    """
    _check(prefix_mode, compat)
    if null_every < 1:
        raise ValueError(f"null_every must be at least 1, got {null_every}")
    prefix = [None] * len(noise) if prefix is None else prefix
    if "shared_momentum" in compat:
        if len({x.shape for x in noise}) > 1:
            raise ValueError("compat shared_momentum needs samples of one shape, as the published code does")
        states = [_State([x], [p], prefix_mode) for x, p in zip(noise, prefix, strict=True)]
    else:
        states = [_State(noise, prefix, prefix_mode)]
    momentum, done, guided, difference = None, 0, 0, None
    for i, evaluation in enumerate(plan):
        now = resolve(guidance, evaluation.t)
        x = [sample for state in states for sample in state.samples()]
        fresh = now is not None and guided % null_every == 0
        conditional, unconditional = velocity(x, i, fresh)
        if null_every > 1 and fresh:
            difference = [c - u for c, u in zip(conditional, unconditional, strict=True)]
        elif now is not None and not fresh:
            unconditional = [c - d for c, d in zip(conditional, difference, strict=True)]
        guided += now is not None
        conditional, unconditional = iter(conditional), iter(unconditional or ())
        for state in states:
            momentum = state.update(evaluation, conditional, unconditional, now, momentum)
        done += evaluation.last
        if progress is not None and evaluation.last:
            progress(done)
    return [sample for state in states for sample in state.samples()]


def resolve(guidance: CFG | APG | None, t: float) -> CFG | APG | None:
    """The guidance at time t, its scale a number; None where it is off (scale 1)."""
    if guidance is None:
        return None
    scale = float(guidance.scale(t)) if callable(guidance.scale) else guidance.scale
    return None if scale == 1.0 else replace(guidance, scale=scale)


def interval(scale: float, low: float, high: float) -> Callable[[float], float]:
    """A guidance scale that holds for low <= t <= high alone; elsewhere guidance is off, its pass is not computed
    (arXiv 2404.07724).

    Raises ValueError unless 0 <= low <= high <= 1.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high must satisfy 0 <= low <= high <= 1, got {low} and {high}")
    return lambda t: scale if low <= t <= high else 1.0


def _check(prefix_mode: str, compat: Sequence[str]) -> None:
    if prefix_mode not in PREFIX_MODES:
        raise ValueError(f"prefix_mode must be one of {', '.join(PREFIX_MODES)}, got {prefix_mode!r}")
    unknown = set(compat) - set(COMPAT)
    if unknown:
        raise ValueError(f"compat must be among {', '.join(COMPAT)}, got {sorted(unknown)}")


class _State:
    """Samples that take their steps together, in one flat buffer; a row is one channel of one sample.

    stage: where the next velocity is evaluated; states: at the ends of the latest two steps, newest first; past: guided
    velocities that the next evaluation looks back at, oldest first.
    """

    def __init__(self, noise, prefix, prefix_mode: str) -> None:
        self.shapes = [x.shape for x in noise]
        self.stage = _flat(noise)
        self.offsets = _row_offsets(self.shapes, self.stage.device)
        self.noised = prefix_mode == "sdedit"
        self.prefix = None
        if prefix[0] is not None:
            self._take_prefix(noise, prefix)
        self.states, self.past = [self.stage], []

    def _take_prefix(self, noise, prefix) -> None:
        frames = [p.shape[1] for p in prefix]
        taken = _flat([x[:, :k] for x, k in zip(noise, frames, strict=True)]) if self.noised else None
        offsets = _row_offsets([p.shape for p in prefix], self.stage.device)
        self.prefix = Prefix(_flat(prefix).float(), offsets, taken)
        if not self.noised:
            for x, p, k in zip(self.samples(), prefix, frames, strict=True):
                x[:, :k] = p

    def samples(self) -> list[torch.Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [x.view(shape) for x, shape in zip(self.stage.split(sizes), self.shapes, strict=True)]

    def update(self, evaluation: Evaluation, conditional: Iterator, unconditional: Iterator, guidance, momentum):
        """Takes this state's velocities from the two iterators and moves the stage on; returns the momentum buffer."""
        step, count = evaluation.step, len(self.shapes)
        if momentum is None and isinstance(guidance, APG) and guidance.momentum:
            momentum = torch.zeros_like(self.stage)
        self.stage, momentum, *v = flexkernels.flow_update(
            self.states[: len(step.a)],
            step.a,
            _flat(islice(conditional, count)),
            _flat(islice(unconditional, count)) if guidance is not None else None,
            b=step.b,
            past=self.past,
            past_b=step.past_b,
            guidance=guidance,
            momentum_buffer=momentum,
            row_offsets=self.offsets,
            prefix=self._overwrite(evaluation),
            return_velocity=len(evaluation.keep) > 0,
        )
        known = [*self.past, *v]
        self.past = [known[i] for i in evaluation.keep]
        if evaluation.last:
            self.states = [self.stage, self.states[0]]
        return momentum

    def _overwrite(self, evaluation: Evaluation) -> Prefix | None:
        at_end = evaluation.last and evaluation.t_next == 0
        if self.prefix is None or (self.noised and at_end):
            return None
        return replace(self.prefix, time=evaluation.t_next) if self.noised else self.prefix


def _flat(samples: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in samples])


def _row_offsets(shapes, device) -> torch.Tensor:
    lengths = [shape[1:].numel() for shape in shapes for _ in range(shape[0])]
    return torch.tensor([0, *accumulate(lengths)], device=device)

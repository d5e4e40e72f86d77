"""The flow-ODE sampler: integrates dx/dt = v from noise (t = 1) to clean latents (t = 0), guided.

Every evaluation of the velocity is followed by one :func:`flexkernels.flow_update` over all samples, which may differ
in shape: guidance, the solver's sum and the conditioning frames in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from flexkernels import APG, CFG, solvers

from .graphs import StepGraphs
from .states import Evaluation, Flow, Settings, Turn

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
            found.append(Evaluation(t, step, t_next, last=True, takes=True))
        else:
            found += _adams_bashforth(int(solver[-1]) - 1, times, i)
    return found


def _adams_bashforth(back: int, times: Sequence[float], i: int) -> list[Evaluation]:
    """Step i, which looks at most `back` steps back."""
    if back > 1 and i == 0:
        # an Euler step here would cost the method its third order
        return _runge_kutta(solvers.HEUN, *times[:2])
    step = solvers.adams_bashforth(times[max(0, i - back) : i + 2])
    return [Evaluation(times[i], step, times[i + 1], last=True, takes=True)]


def _runge_kutta(tableau: solvers.Tableau, t: float, t_next: float) -> list[Evaluation]:
    steps = solvers.runge_kutta(tableau, t_next - t)
    at = [t + step.at * (t_next - t) for step in steps]
    *stages, end = [
        Evaluation(at[j], step, (*at, t_next)[j + 1], last=False, takes=True) for j, step in enumerate(steps)
    ]
    return [*stages, end._replace(last=True, takes=False)]


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
    graphs: StepGraphs | None = None,
) -> list[torch.Tensor]:
    """Integrates the guided velocity.

    Args:
        velocity: ``velocity(x, i, guided)`` -> (conditional, unconditional or None) velocities of the plan's evaluation
            i, lists like x. x are buffers that the next evaluation overwrites.
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
        graphs: where evaluations are replayed from, of a velocity that is a :class:`vft.velocity.GuidedVelocity`.

    Returns:
        The latents at t = 0, list of float32 ``[C, T, H, W]``.

    Raises:
        ValueError: an unknown prefix mode or compat name, or null_every below 1.
    """
    _check(prefix_mode, compat)
    if null_every < 1:
        raise ValueError(f"null_every must be at least 1, got {null_every}")
    shared = "shared_momentum" in compat
    if shared and len({x.shape for x in noise}) > 1:
        raise ValueError("compat shared_momentum needs samples of one shape, as the published code does")
    settings = Settings.of(noise, plan, guidance, prefix, prefix_mode == "sdedit", shared)
    turns = _turns(plan, guidance, null_every)
    if graphs is not None:
        with graphs.run(velocity, settings) as run:
            run.begin(noise, prefix, velocity, turns)
            _integrate(turns, run.advance, progress)
            return [x.clone() for x in run.flow.samples()]
    flow = Flow(settings, noise[0].device)
    flow.begin(noise, prefix)
    _integrate(turns, lambda i: flow.advance(lambda x, fresh: velocity(x, i, fresh), turns[i]), progress)
    return flow.samples()


def _turns(plan: Sequence[Evaluation], guidance: CFG | APG | None, null_every: int) -> list[Turn]:
    guided, turns = 0, []
    for evaluation in plan:
        now = resolve(guidance, evaluation.t)
        turns.append(Turn(evaluation, now, now is not None and guided % null_every == 0))
        guided += now is not None
    return turns


def _integrate(turns: Sequence[Turn], advance: Callable[[int], None], progress: Callable[[int], None] | None) -> None:
    done = 0
    for i, turn in enumerate(turns):
        advance(i)
        done += turn.evaluation.last
        if progress is not None and turn.evaluation.last:
            progress(done)


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

"""What a run of the sampler holds: the samples' states and velocities in buffers that stay in their place, so that an
evaluation of it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import torch

import flexkernels
from flexkernels import APG, CFG, Prefix, solvers


class Evaluation(NamedTuple):
    """One velocity of a solver, at time t, and the update that follows it.

    step: its coefficients; t_next: the time that its result belongs to; last: whether it ends a step of the solver;
    takes: whether later evaluations look back at its velocity.
    """

    t: float
    step: solvers.Step
    t_next: float
    last: bool
    takes: bool


class Turn(NamedTuple):
    """An evaluation with the guidance at its time, its scale a number, or None; fresh: whether the unconditional
    velocity is computed, else it follows from the last one."""

    evaluation: Evaluation
    guidance: CFG | APG | None
    fresh: bool


class Settings(NamedTuple):
    """What the buffers and the kernels of a run depend on.

    shapes: ``[C, T, H, W]`` of each sample; states, past: the most states and past velocities that an evaluation takes;
    staged: whether there are evaluations inside of steps; guidance: its numbers but for the scale; frames: of the
    prefix of each sample, or None; noised: whether the prefix is noised to each evaluation's time; shared: whether the
    samples hand on one momentum buffer.
    """

    shapes: tuple[torch.Size, ...]
    states: int
    past: int
    staged: bool
    guidance: CFG | APG | None
    frames: tuple[int, ...] | None
    noised: bool
    shared: bool

    @classmethod
    def of(cls, noise, plan: Sequence[Evaluation], guidance, prefix, noised: bool, shared: bool) -> Settings:
        return cls(
            tuple(x.shape for x in noise),
            max((len(e.step.a) for e in plan), default=1),
            max((len(e.step.past_b) for e in plan), default=0),
            not all(e.last for e in plan),
            None if guidance is None else replace(guidance, scale=0.0),
            None if prefix is None else tuple(p.shape[1] for p in prefix),
            noised and prefix is not None,
            shared,
        )


Velocity = Callable[[list[torch.Tensor], bool], tuple[list[torch.Tensor], list[torch.Tensor] | None]]


class Flow:
    """All samples on their way from noise to latents; :meth:`begin` before each run, then an :meth:`advance` each
    evaluation. A kept one serves another run of the same settings: nothing that the run before left is read."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        # with a shared momentum each sample takes its steps by itself
        parts = [slice(i, i + 1) for i in range(len(settings.shapes))] if settings.shared else [slice(None)]
        self.parts = [(part, _State(settings, part, device)) for part in parts]
        # made when first needed
        self.momentum: torch.Tensor | None = None
        self.difference: list[torch.Tensor] | None = None

    def begin(self, noise: Sequence[torch.Tensor], prefix: Sequence[torch.Tensor] | None) -> None:
        for part, state in self.parts:
            state.begin(noise[part], None if prefix is None else prefix[part])
        if self.momentum is not None:
            self.momentum.zero_()

    def samples(self) -> list[torch.Tensor]:
        """Views of the buffers that :meth:`advance` moves on."""
        return [sample for _, state in self.parts for sample in state.samples()]

    def kind(self, turn: Turn) -> tuple:
        """Turns of one kind launch the same kernels, which differ in the numbers of :meth:`scalars` alone."""
        evaluation = turn.evaluation
        return evaluation.last, evaluation.takes, turn.guidance is not None, turn.fresh, self._overwrites(evaluation)

    def scalars(self, turn: Turn) -> list[float]:
        """A row for :func:`flexkernels.flow_update`'s argument of that name."""
        step = turn.evaluation.step
        a, past_b = self.parts[0][1].weights(step)
        scale = 1.0 if turn.guidance is None else turn.guidance.scale
        return solvers.scalars(a, step.b, past_b, scale, turn.evaluation.t_next if self.settings.noised else 0.0)

    def advance(self, velocity: Velocity, turn: Turn, scalars: torch.Tensor | None = None) -> None:
        """One evaluation: velocity(x, whether the unconditional one is wanted), guidance, the solver's sum and the
        conditioning frames; scalars: a row of that name on the device in place of the turn's numbers."""
        conditional, unconditional = velocity(self.samples(), turn.fresh)
        if turn.guidance is not None and turn.fresh:
            self._keep_difference(conditional, unconditional)
        elif turn.guidance is not None:
            unconditional = [c - d for c, d in zip(conditional, self.difference, strict=True)]
        momentum = isinstance(turn.guidance, APG) and turn.guidance.momentum != 0
        if momentum and self.momentum is None:
            self.momentum = torch.zeros_like(self.parts[0][1].stage)
        conditional, unconditional = iter(conditional), iter(unconditional or ())
        for _, state in self.parts:
            prefix = state.prefix if self._overwrites(turn.evaluation) else None
            state.update(turn, conditional, unconditional, self.momentum if momentum else None, prefix, scalars)

    def _keep_difference(self, conditional, unconditional) -> None:
        pairs = zip(conditional, unconditional, strict=True)
        if self.difference is None:
            self.difference = [c - u for c, u in pairs]
        else:
            for difference, (c, u) in zip(self.difference, pairs, strict=True):
                torch.sub(c, u, out=difference)

    def _overwrites(self, evaluation: Evaluation) -> bool:
        at_end = evaluation.last and evaluation.t_next == 0
        return self.settings.frames is not None and not (self.settings.noised and at_end)


class _State:
    """Samples that take their steps together, flat one after the other; a row is one channel of one sample.

    stage: where the next velocity is evaluated; states: at the ends of the latest steps, newest first; past: guided
    velocities, newest last.
    """

    def __init__(self, settings: Settings, part: slice, device: torch.device) -> None:
        self.shapes = settings.shapes[part]
        self.noised, frames = settings.noised, settings.frames and settings.frames[part]
        total = sum(shape.numel() for shape in self.shapes)
        count = 1 + settings.states + settings.past
        self.stage, *buffers = (torch.empty(total, device=device) for _ in range(count))
        # without stages inside of steps the stage is the end of the latest one
        self.states = [buffers[0] if settings.staged else self.stage, *buffers[1 : settings.states]]
        self.past = buffers[settings.states :]
        self.offsets = _row_offsets(self.shapes, device)
        self.prefix = None
        if frames is not None:
            shapes = [torch.Size((c, k, h, w)) for (c, _, h, w), k in zip(self.shapes, frames, strict=True)]
            values = torch.empty(sum(shape.numel() for shape in shapes), device=device)
            noise = torch.empty_like(values) if self.noised else None
            self.prefix = Prefix(values, _row_offsets(shapes, device), noise)

    def begin(self, noise, prefix) -> None:
        self.stage.copy_(_flat(noise))
        if prefix is not None:
            self.prefix.values.copy_(_flat(prefix))
            if self.noised:
                self.prefix.noise.copy_(_flat([x[:, : p.shape[1]] for x, p in zip(noise, prefix, strict=True)]))
            else:
                for x, p in zip(self.samples(), prefix, strict=True):
                    x[:, : p.shape[1]] = p
        if self.states[0] is not self.stage:
            self.states[0].copy_(self.stage)

    def samples(self) -> list[torch.Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [x.view(shape) for x, shape in zip(self.stage.split(sizes), self.shapes, strict=True)]

    def weights(self, step: solvers.Step) -> tuple[list[float], list[float]]:
        """Of all states and all past velocities: 0 for those that a step does not take."""
        before = [0.0] * (len(self.past) - len(step.past_b))
        return [*step.a, *[0.0] * (len(self.states) - len(step.a))], [*before, *step.past_b]

    def update(self, turn: Turn, conditional: Iterator, unconditional: Iterator, momentum, prefix, scalars) -> None:
        """Takes this state's velocities from the two iterators and moves the buffers on, and momentum where given."""
        evaluation, count = turn.evaluation, len(self.shapes)
        a, past_b = self.weights(evaluation.step)
        takes = evaluation.takes and len(self.past) > 0
        x_next, momentum_next, *v = flexkernels.flow_update(
            self.states,
            a,
            _flat(islice(conditional, count)),
            _flat(islice(unconditional, count)) if turn.guidance is not None else None,
            b=evaluation.step.b,
            past=self.past,
            past_b=past_b,
            guidance=turn.guidance,
            momentum_buffer=momentum,
            row_offsets=self.offsets,
            prefix=replace(prefix, time=evaluation.t_next) if prefix is not None and self.noised else prefix,
            return_velocity=takes,
            scalars=scalars,
        )
        if momentum is not None:
            momentum.copy_(momentum_next)
        if takes:
            _move_on([*self.past, *v])
        if evaluation.last:
            _move_on([*reversed(self.states), x_next])
        if not evaluation.last or self.states[0] is not self.stage:
            self.stage.copy_(x_next)


def _move_on(buffers: Sequence[torch.Tensor]) -> None:
    """Each takes the values of the one after it."""
    for older, newer in pairwise(buffers):
        older.copy_(newer)


def _flat(samples: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in samples])


def _row_offsets(shapes, device) -> torch.Tensor:
    lengths = [shape[1:].numel() for shape in shapes for _ in range(shape[0])]
    return torch.tensor([0, *accumulate(lengths)], device=device)

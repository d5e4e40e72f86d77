"""The training loop of ``vft train``. Stop and start it at will: it resumes where it was.

A run is a folder, see :mod:`vft.train.state`. What a step draws depends on (seed, step) alone: the step is the position
in the data and the state of all random numbers, so a resumed run repeats the same losses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from .. import progress
from ..files import only_writer
from . import optimizer, parallel, procedural, state
from .data import PROCEDURAL
from .start import Start


class Task(Protocol):
    """What is trained: a model, its loss on a batch drawn with ``generator``, and how its weights become a file.

    ``loss`` is the mean over the samples ``part`` of the batch; what is drawn for a sample does not depend on the part.
    ``indices`` are those of the whole batch in ``data``, the first thing that is drawn. ``recompute`` is whether
    activations are computed again in the backward pass instead of kept. ``start`` is the checkpoint that the model
    continues, or None; ``example`` a command that uses the saved model, ``{}`` standing for its folder.
    """

    model: nn.Module
    data: object
    start: Start | None
    example: str

    def indices(self, generator: torch.Generator) -> list[int]: ...

    def loss(self, generator: torch.Generator, part: slice = slice(None)) -> torch.Tensor: ...

    def recompute(self, on: bool) -> None: ...

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class Settings:
    """Settings of a run; those of a new small model by default. A run is resumed with the same (``steps`` aside).

    ``batch`` counts the clips of a step over all processes and accumulations; ``clips`` how many different ones there
    are. ``frames`` and ``sizes``: lengths and square sides in pixels, one of each drawn for each clip, empty for those
    that the model works at. ``optimizer``: ``muon`` for the matrices of blocks and AdamW for the rest, or ``adamw`` for
    all. ``bf16``: autocast, and the products of Muon. ``corruption``: share of tokens replaced by random ones where the
    model reads them. ``recipe``: which procedural video, see :mod:`vft.train.procedural`. ``start``: a checkpoint to
    continue, with ``lora`` by factors of that rank alone (0: all weights).
    """

    steps: int = 8500
    batch: int = 8
    clips: int = 24000
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    optimizer: str = "muon"
    bf16: bool = False
    data: str = PROCEDURAL
    frames: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    corruption: float = 0.0
    recipe: int = 1
    start: str = ""
    lora: int = 0


# of a run that continues a checkpoint: small steps, and an average that forgets within a few hundred of them
FINE_TUNING = {"steps": 1000, "learning_rate": 5e-4, "warmup": 20, "ema": 0.99}


@dataclass(frozen=True)
class Engine:
    """How a run is computed. This may change whenever it is resumed: the losses stay the same up to float rounding.

    ``accumulate`` micro-batches a step; ``checkpoint``: recompute activations in the backward pass instead of keeping
    them; ``parallel``: see :mod:`vft.train.parallel`; a state is saved every ``save_seconds``; ``workers`` processes
    render procedural clips (0: threads of this one).
    """

    device: str = "cpu"
    parallel: str | None = None
    accumulate: int = 1
    checkpoint: bool = False
    save_seconds: float = 120.0
    workers: int = 0


def add_arguments(parser: argparse.ArgumentParser, defaults: Settings, refused: tuple[str, ...] = ()) -> None:
    """The arguments that every kind of run has; their defaults are others where a checkpoint is continued. The help
    leaves out those that this kind refuses by name."""

    def add(*names: str, **options) -> None:
        if not set(refused).isdisjoint(names):
            options["help"] = argparse.SUPPRESS
        parser.add_argument(*names, **options)

    if any(word == "--from" or word.startswith("--from=") for word in parser.get_default("words") or ()):
        defaults = replace(defaults, **FINE_TUNING)
    add("-o", "--output", type=Path, required=True, help="folder of the run; an existing run is resumed")
    add("--plot", type=Path, metavar="RUN", help="plot the loss of this run into the picture -o, and train nothing")
    add(
        "--from", dest="start", default="", metavar="MODEL", help="checkpoint to continue: name, folder, file, org/repo"
    )
    add("--lora", type=int, default=0, metavar="RANK", help="with --from: train low-rank factors of its matrices alone")
    add("--data", default=defaults.data, help="'procedural', 'named' or a folder (default %(default)s)")
    add(
        "--recipe", type=int, choices=procedural.RECIPES, default=defaults.recipe,
        help="of procedural video; 2: half of it as a camera films it (default %(default)s)",
    )  # fmt: skip
    add("--steps", type=int, default=defaults.steps, help="optimiser steps (default %(default)s)")
    add("--batch", type=int, default=defaults.batch, help="clips a step over all processes (default %(default)s)")
    add("--clips", type=int, default=defaults.clips, help="different clips to draw from (default %(default)s)")
    add("--frames", type=int, nargs="+", default=defaults.frames, help="lengths of clips, 1 + 4k (default the model's)")
    add("--sizes", type=int, nargs="+", default=defaults.sizes, help="sides of clips in pixels (default the model's)")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="at its peak (default %(default)s)")
    add("--warmup", type=int, default=defaults.warmup, help="steps of linear warm-up (default %(default)s)")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="default %(default)s")
    add("--clip", type=float, default=defaults.clip, help="largest norm of the gradient (default %(default)s)")
    add("--ema", type=float, default=defaults.ema, help="decay of the averaged weights (default %(default)s)")
    add("--corruption", type=float, default=defaults.corruption, help="share of random tokens (default %(default)s)")
    add("--optimizer", choices=optimizer.OPTIMIZERS, default=defaults.optimizer, help="default %(default)s")
    add("--bf16", action="store_true", help="bfloat16 autocast, where the device multiplies it fast")
    add("--minutes", type=float, default=None, help="stop (resumably) after this much time")
    engine = Engine()
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default %(default)s)")
    add("--parallel", choices=parallel.MODES, help="under torchrun: replicate or shard the model (default ddp)")
    add("--accumulate", type=int, default=engine.accumulate, help="micro-batches a step (default %(default)s)")
    add("--checkpoint", action="store_true", help="recompute activations instead of keeping them")
    add(
        "--workers", type=int, default=(os.cpu_count() or 1) if torch.cuda.is_available() else engine.workers,
        help="processes of this one that render procedural clips, 0: threads (default %(default)s)",
    )  # fmt: skip
    add("--save-seconds", type=float, default=engine.save_seconds, help="between saved states (default %(default)s)")


def run(args: argparse.Namespace, settings: Settings, train: Callable) -> int:
    """Plots or trains as the parsed arguments say; returns the exit code."""
    if args.plot is not None:
        from .. import plots

        plots.training_loss(args.plot, args.output)
    else:
        engine = Engine(args.device, args.parallel, args.accumulate, args.checkpoint, args.save_seconds, args.workers)
        train(args.output, settings, minutes=args.minutes, engine=engine)
    return 0


def common(args: argparse.Namespace) -> dict:
    """The settings that :func:`add_arguments` reads."""
    return {
        "steps": args.steps, "batch": args.batch, "clips": args.clips, "learning_rate": args.learning_rate,
        "warmup": args.warmup, "weight_decay": args.weight_decay, "clip": args.clip, "ema": args.ema,
        "seed": args.seed, "optimizer": args.optimizer, "bf16": args.bf16, "data": args.data,
        "frames": tuple(args.frames), "sizes": tuple(args.sizes), "corruption": args.corruption,
        "recipe": args.recipe, "start": args.start, "lora": args.lora,
    }  # fmt: skip


def check(settings: Settings) -> None:
    """Raises ValueError naming a setting that is out of range."""
    for name in ("steps", "batch", "clips", "warmup"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if not 0 < settings.learning_rate < 1:
        raise ValueError(f"learning_rate must lie between 0 and 1, got {settings.learning_rate}")
    for name in ("weight_decay", "ema", "corruption"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(settings, name)}")
    if settings.recipe not in procedural.RECIPES:
        raise ValueError(f"recipe must be one of {procedural.RECIPES}, got {settings.recipe!r}")
    if settings.optimizer not in optimizer.OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(optimizer.OPTIMIZERS)}, got {settings.optimizer!r}")
    if not settings.clip > 0:
        raise ValueError(f"clip must be above 0, got {settings.clip}")
    if settings.lora < 0 or (settings.lora and not settings.start):
        raise ValueError(f"lora must be at least 0, and 0 without a checkpoint to start from, got {settings.lora}")


def train(
    folder: Path, settings: Settings, task: Task, minutes: float | None = None, engine: Engine | None = None
) -> None:
    """Trains or resumes the run in ``folder``.

    Raises ValueError when the folder holds a run with other settings, model or data, OSError when it cannot be written
    or another process trains in it, and RuntimeError when the loss or its gradient is not finite (the last saved state
    stays).
    """
    engine = engine or Engine()
    if engine.workers < 0:
        raise ValueError(f"workers must be at least 0, got {engine.workers}")
    with parallel.joined(engine.parallel, engine.device) as group:
        if settings.lora and group.mode == "fsdp":
            raise ValueError("lora must be 0 with parallel fsdp, whose shards hold no factors: use ddp")
        if group.rank == 0:
            state.open_folder(folder)
        with closing(task.data), only_writer(folder) if group.rank == 0 else nullcontext():
            _Run(folder, settings, Trainer(settings, task, engine, group)).go(engine, minutes)


class Trainer:
    """The model, its average, the optimiser, and one step of them on this process's share of the batch."""

    def __init__(self, settings: Settings, task: Task, engine: Engine, group: parallel.Group) -> None:
        self.settings, self.task, self.group = settings, task, group
        self.parts = group.parts(settings.batch, engine.accumulate)
        task.data.start_workers(engine.workers, group.device)
        # steps whose clips are read ahead: enough to keep all workers at work
        self.ahead = 1 + 2 * engine.workers // settings.batch
        task.model.to(group.device)
        task.recompute(engine.checkpoint)
        self.loss = parallel.spread(task, group)
        self.whole = dict(task.model.named_parameters())
        self.parameters = {name: p for name, p in self.whole.items() if p.requires_grad}
        self.ema = {name: parallel.local(p).detach().clone() for name, p in self.parameters.items()}
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        self.optimizer_of = optimizer.make(
            self.parameters, settings.optimizer, settings.learning_rate, settings.weight_decay, dtype
        )

    def step(self, step: int) -> tuple[float, float]:
        """The loss of the whole batch and the norm of its gradient; where one is not finite, nothing is changed."""
        for ahead in range(1, self.ahead + 1):
            self._fetch(step + ahead)
        total = torch.zeros((), device=self.group.device)
        for part in self.parts:
            with parallel.synchronised(self.loss, part is self.parts[-1]):
                with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.settings.bf16):
                    loss = self.loss(draws(self.settings, step), part) / len(self.parts)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        # the one wait of a step
        loss, norm = torch.stack([self.group.mean(total), parallel.whole(norm, norm)]).tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            for each in dict.fromkeys(self.optimizer_of.values()):
                for group in each.param_groups:
                    group["lr"] = learning_rate(self.settings, step)
                each.step()
            self._average(min(self.settings.ema, (2 + step) / (11 + step)))
        self.task.model.zero_grad()
        return loss, norm

    def _fetch(self, step: int) -> None:
        """Begins to read what a later step needs."""
        if step < self.settings.steps:
            indices = self.task.indices(draws(self.settings, step))
            self.task.data.fetch([i for part in self.parts for i in indices[part]])

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        weights = [parallel.local(p) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)

    def averaged(self) -> dict[str, torch.Tensor]:
        """The EMA weights and those that are not trained, whole, on the CPU. All processes must call it."""
        weights = {name: self.ema.get(name, parallel.local(p).detach()) for name, p in self.whole.items()}
        return {name: parallel.whole(weights[name], p).cpu() for name, p in self.whole.items()}


class _Run:
    """A trainer and its folder."""

    def __init__(self, folder: Path, settings: Settings, trainer: Trainer) -> None:
        self.folder, self.settings, self.trainer = folder, settings, trainer
        self.task, self.group = trainer.task, trainer.group
        self.facts = {
            "settings": asdict(settings), "model": self.task.model.config.raw, "data": self.task.data.facts(),
        }  # fmt: skip
        if self.task.start:
            self.facts["start"] = self.task.start.digest
        self.reported = 0
        self.step = state.load(folder / state.STATE, trainer, self.facts)
        if self.group.rank == 0:
            state.rewind_log(folder, self.step)
        if self.task.start:
            self._say(self.task.start.describe())
        self._report_skipped()

    def go(self, engine: Engine, minutes: float | None) -> None:
        started = saved = time.time()
        first, settings = self.step, self.settings
        shown = {"total": settings.steps, "initial": self.step, "desc": "train", "unit": "step"}
        with progress.bar(hidden=self.group.rank > 0, **shown) as bar, _asked_to_stop() as asked:
            while self.step < settings.steps:
                rate = learning_rate(settings, self.step)
                loss, norm = self.trainer.step(self.step)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self._fail(loss, norm)
                self.step += 1
                seconds = time.time() - started
                speed = (self.step - first) * settings.batch / seconds
                self._log(step=self.step, loss=loss, grad_norm=norm, lr=rate, seconds=seconds, clips_per_second=speed)
                bar.set_postfix(loss=f"{loss:.4f}", clips_per_second=f"{speed:.1f}")
                bar.update()
                timed_out = (minutes is not None and seconds > 60 * minutes) or bool(asked)
                due = time.time() - saved > engine.save_seconds or timed_out
                # clocks differ: one process decides
                stop, due = self.group.agree(timed_out), self.group.agree(due)
                if due or self.step == settings.steps:
                    self._save()
                    saved = time.time()
                if stop:
                    break
        self._report_end()
        if asked:
            # what it does outside of a run: end the process, by an exception in the vft command
            signal.raise_signal(asked[0])

    def _report_end(self) -> None:
        steps, folder = self.settings.steps, self.folder
        if self.step < steps:
            self._say(f"stopped at step {self.step}; the same command goes on from {folder / state.STATE}")
        self._say(f"{folder / state.MODEL}: step {self.step} of {steps}. Next: {self.task.example.format(folder)}")

    def _say(self, line: str) -> None:
        if self.group.rank == 0:
            tqdm.write(line, sys.stdout)

    def _save(self) -> None:
        averaged = self.trainer.averaged()
        try:
            if self.group.rank == 0:
                self.task.save(self.folder / state.MODEL, averaged)
            # last, so that a complete state has its model
            state.save(self.folder / state.STATE, self.trainer, self.facts | {"step": self.step})
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"step {self.step} cannot be saved in {self.folder} ({reason}); the last saved state is unharmed"
            raise OSError(message) from error
        self._report_skipped()

    def _log(self, **line) -> None:
        if self.group.rank == 0:
            rounded = {k: v if isinstance(v, int) else float(f"{v:.7g}") for k, v in line.items()}
            with (self.folder / state.LOG).open("a") as log:
                log.write(json.dumps(rounded) + "\n")

    def _fail(self, loss: float, norm: float) -> None:
        indices = self.task.indices(draws(self.settings, self.step))
        state.save(self.folder / "failed.safetensors", self.trainer, self.facts | {"step": self.step})
        if self.group.rank == 0:
            facts = {"step": self.step, "loss": str(loss), "grad_norm": str(norm), "indices": indices}
            state.write_json(self.folder / "failed.json", facts)
        raise RuntimeError(
            f"the loss is {loss} at step {self.step} (gradient norm {norm}), batch {indices}; the state before "
            f"it is {self.folder / 'failed.safetensors'}, the last saved state is unharmed"
        )

    def _report_skipped(self) -> None:
        skipped, path = dict(self.task.data.skipped), self.folder / f"skipped.{self.group.rank}.json"
        if len(skipped) > self.reported:
            self.reported = len(skipped)
            state.write_json(path, dict(sorted(skipped.items())))
            tqdm.write(f"vft: {len(skipped)} files of {self.settings.data} skipped, see {path}", sys.stderr)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """The signals (Ctrl-C, SIGTERM) that have come: the first waits for the end of a step, a second one does not."""
    asked, before = [], {}

    def note(number, _):
        if asked:
            restore()
            signal.raise_signal(number)
        asked.append(number)
        print("vft: stopping after this step (again: at once)", file=sys.stderr)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    # only the main thread may set a signal
    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        restore()


def draws(settings: Settings, step: int) -> torch.Generator:
    """The random numbers of a step."""
    return torch.Generator().manual_seed(settings.seed * 1_000_003 + step)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to 2% at the last step."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

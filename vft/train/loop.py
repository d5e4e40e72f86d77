"""The training loop of ``vft train``. Stop and start it at will: it resumes where it was.

A run is a folder: ``state.safetensors`` (weights, EMA, optimiser moments; step and settings as metadata),
``log.jsonl`` (the running loss), ``model.safetensors`` (the EMA weights in float16, for ``from_pretrained``). What a
step draws depends on (seed, step) alone, so a resumed run repeats the same losses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import nn
from tqdm import tqdm

from ..files import replacing
from . import procedural


class Task(Protocol):
    """What is trained: a model, its loss on a batch drawn with ``generator``, and how its weights become a file."""

    model: nn.Module

    def loss(self, generator: torch.Generator) -> torch.Tensor: ...

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the defaults made the embedded tokenizer. A run is resumed with the same (``steps`` aside)."""

    steps: int = 4400
    batch: int = 8
    clips: int = 8000
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    bf16: bool = True


def add_arguments(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """The arguments that every kind of run has."""
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the run; an existing run is resumed"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimiser steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="clips a step (default %(default)s)")
    parser.add_argument(
        "--clips", type=int, default=defaults.clips, help="different clips to draw from (default %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of linear warm-up")
    parser.add_argument("--no-bf16", action="store_true", help="float32 instead of bfloat16 autocast")
    parser.add_argument("--minutes", type=float, default=None, help="stop (resumably) after this much time")


def common(args: argparse.Namespace) -> dict:
    """The settings that :func:`add_arguments` reads."""
    return {
        "steps": args.steps, "batch": args.batch, "clips": args.clips, "learning_rate": args.learning_rate,
        "warmup": args.warmup, "seed": args.seed, "bf16": not args.no_bf16,
    }  # fmt: skip


def train(folder: Path, settings: Settings, task: Task, minutes: float | None = None) -> None:
    """Trains or resumes the run in ``folder``.

    Raises ValueError when the folder holds a run with other settings, and RuntimeError when the loss is not finite
    (the last saved state stays).
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = task.model
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = _optimizer(model, settings)
    step = _resume(folder, settings, model, ema, optimizer)
    started, saved, running = time.time(), time.time(), None
    with (
        (folder / "log.jsonl").open("a") as log,
        tqdm(total=settings.steps, initial=step, desc="train", disable=not sys.stderr.isatty()) as bar,
    ):
        while step < settings.steps:
            loss = _step(task, optimizer, settings, step)
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {step}; the last saved state in {folder} is unharmed")
            step += 1
            _update_ema(ema, model, min(settings.ema, (1 + step) / (10 + step)))
            running = loss if running is None else 0.98 * running + 0.02 * loss
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}")
            if step % 20 == 0:
                seconds = round(time.time() - started, 1)
                log.write(json.dumps({"step": step, "loss": round(running, 5), "seconds": seconds}) + "\n")
                log.flush()
            timed_out = minutes is not None and time.time() - started > 60 * minutes
            if time.time() - saved > 120 or timed_out or step == settings.steps:
                _save(folder, settings, task, ema, optimizer, step)
                saved = time.time()
            if timed_out:
                break


def check(settings: Settings) -> None:
    """Raises ValueError naming a setting that is out of range."""
    for name in ("steps", "batch", "clips", "warmup"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if not 0 < settings.learning_rate < 1:
        raise ValueError(f"learning_rate must lie between 0 and 1, got {settings.learning_rate}")


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to 2% at the last step."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Clips:
    """Procedural clips, rendered on first use and kept as what ``encode`` makes of them ``[B, 3, T, H, W]``."""

    def __init__(self, encode, seed: int, size: int, frames: int) -> None:
        self.encode, self.seed, self.size, self.frames = encode, seed, size, frames
        self.encoded: dict[int, torch.Tensor] = {}

    def batch(self, indices: list[int]) -> torch.Tensor:
        missing = sorted(set(indices) - self.encoded.keys())
        if missing:
            clips = procedural.batch(self.seed, missing, self.size, self.frames, torch.get_num_threads())
            self.encoded.update(zip(missing, self.encode(clips), strict=True))
        return torch.stack([self.encoded[i] for i in indices])


def _step(task: Task, optimizer, settings: Settings, step: int) -> float:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
        loss = task.loss(generator)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def _update_ema(ema: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.values()), list(model.parameters()), 1 - decay)


def _save(folder: Path, settings: Settings, task: Task, ema, optimizer, step: int) -> None:
    model = task.model
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()} | {f"ema.{n}": p for n, p in ema.items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value
    with replacing(folder / "state.safetensors") as temporary:
        temporary.write_bytes(serialize(tensors, {"step": str(step), "settings": json.dumps(asdict(settings))}))
    task.save(folder / "model.safetensors", ema)


def _resume(folder: Path, settings: Settings, model: nn.Module, ema, optimizer) -> int:
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        before = json.loads(metadata["settings"])
        changed = {k: v for k, v in before.items() if k != "steps" and v != getattr(settings, k)}
        if changed:
            raise ValueError(f"the run in {folder} was made with {changed}; resume it with the same settings")
        stored = set(file.keys())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(file.get_tensor(f"model.{name}"))
                ema[name].copy_(file.get_tensor(f"ema.{name}"))
                # a token that no sample needed yet has had no gradient, so no moments
                if f"optimizer.step.{name}" in stored:
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    optimizer.state[p] = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in keys}
    return int(metadata["step"])

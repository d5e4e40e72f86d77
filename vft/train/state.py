"""A run on disk: its state, its log and what is wrong with its data.

    state.safetensors  weights that are trained (with LoRA the factors), their EMA, optimiser moments; step, settings,
                       model, data and start as JSON metadata; never pickle
    failed.safetensors the same from before the step whose loss was not finite, and failed.json: that step and batch
    log.jsonl          one line a step: loss, gradient norm, learning rate, seconds, clips a second
    model.safetensors  the model of the EMA weights, mostly in float16, for ``from_pretrained``
    skipped.<rank>.json  files of the data that could not be read, and why

Files are replaced whole, so a run that is killed at any moment, or meets a full disk, keeps its last state.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from ..files import check_folder, check_output, replacing
from . import parallel

STATE, LOG, MODEL = "state.safetensors", "log.jsonl", "model.safetensors"
_LEFT_OVER = re.compile(r"\.[0-9a-f]{12}\.tmp")
# of AdamW and of Muon
_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")


def open_folder(folder: Path) -> None:
    """Makes the folder of a run; removes what a killed save has left in it.

    Raises OSError in one line where it cannot be made or written, or holds a model that is not a run's.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output {str(folder)!r} cannot be made: {error.strerror}") from error
    check_output(folder / STATE)
    # a run writes its log before its first model
    if (folder / MODEL).exists() and not (folder / LOG).exists():
        raise OSError(f"output {str(folder)!r} holds a {MODEL} that no training made: give another folder")
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            path.unlink()


def save(path: Path, trainer, facts: dict) -> None:
    """Writes the trainer's weights, EMA and moments, gathered whole; ``facts`` become JSON metadata."""
    tensors = {}
    for name, p in trainer.parameters.items():
        tensors[f"model.{name}"] = _whole(p.detach(), p)
        tensors[f"ema.{name}"] = _whole(trainer.ema[name], p)
        for key, value in trainer.optimizer_of[name].state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value.cpu() if key == "step" else _whole(value, p)
    if trainer.group.rank == 0:
        metadata = {key: json.dumps(value) for key, value in facts.items()}
        with replacing(path) as temporary:
            temporary.write_bytes(serialize(tensors, metadata))


def _whole(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return parallel.whole(x, like).cpu().contiguous()


def load(path: Path, trainer, facts: dict) -> int:
    """Reads a state that :func:`save` wrote into the trainer; returns its step, 0 where there is none.

    Raises ValueError naming what differs between the facts of the state and those given (``steps`` may differ), or for
    a damaged file.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            before = {key: json.loads(value) for key, value in file.metadata().items()}
            refuse_difference(path.parent, before, facts)
            _fill(file, trainer)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
    return before["step"]


@torch.no_grad()
def _fill(file, trainer) -> None:
    stored = set(file.keys())
    for name, p in trainer.parameters.items():
        p.copy_(parallel.scatter(file.get_tensor(f"model.{name}"), p))
        trainer.ema[name].copy_(parallel.local(parallel.scatter(file.get_tensor(f"ema.{name}"), p)))
        # a parameter that no sample needed yet has had no gradient, so no moments
        for key in _MOMENTS:
            if f"optimizer.{key}.{name}" in stored:
                value = file.get_tensor(f"optimizer.{key}.{name}")
                # torch keeps the step of fused AdamW on the parameter's device
                value = value.to(p.device) if key == "step" else parallel.scatter(value, p)
                trainer.optimizer_of[name].state[p][key] = value


def refuse_difference(folder: Path, before: dict, now: dict) -> None:
    """Raises ValueError naming the kind of model, or every setting and part of the model, of the data and of the start
    that differs."""
    kinds = [_kind(facts) for facts in (before, now)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the run in {folder} trains {kinds[0]}, not {kinds[1]}: give another folder with -o")
    names = ("settings", "model", "data", "start")
    old, new = (_flat({name: facts.get(name) for name in names}) for facts in (before, now))
    # what is off may be missing: earlier versions did not have it
    differs = lambda k: k != "settings.steps" and (old.get(k) or None) != (new.get(k) or None)  # noqa: E731
    changed = [k for k in sorted(old.keys() | new.keys()) if differs(k)]
    if changed:
        shown = ", ".join(f"{k.removeprefix('settings.')} {old.get(k)!r} (now {new.get(k)!r})" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(f"the run in {folder} was made with {shown}{more}; resume it with the same settings")


def _kind(facts: dict) -> str:
    if "cond" in facts["model"]:
        return "a generator"
    # only the settings of a refiner, beside those of a generator, name a tokenizer
    return "a refiner" if "tokenizer" in facts["settings"] else "a tokenizer"


def _flat(value, prefix: str = "") -> dict:
    """Nested dicts as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log; half a line, which a killed process may leave at the end, is left out.

    Raises ValueError where there is no log.
    """
    path = folder / LOG
    if not path.is_file():
        raise ValueError(f"{folder} must be the folder of a run, with a {LOG} in it")
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def rewind_log(folder: Path, step: int) -> None:
    """Drops the lines after ``step``: those steps are repeated."""
    kept = [line for line in read_log(folder) if line["step"] <= step] if (folder / LOG).is_file() else []
    with replacing(folder / LOG) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")

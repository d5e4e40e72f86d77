"""Where a run that continues a checkpoint starts: its weights, in a model that may have other sizes.

What both models have is reused; tables that grow (registers, positions, classes) keep their entries, and the new ones
start as those of a new model do. Nothing else may differ.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import checkpoint
from ..config import GeneratorConfig, TokenizerConfig, parse_config, parse_generator_config
from ..fingerprint import add_tensors
from ..generator import Generator
from ..tokenizer import Tokenizer

# of learned positions: dictionary entries in the published config
_TABLES = {
    "encoder.patch_posemb.table": "patches",
    "decoder.patch_posemb.table": "patches",
    "decoder.register_posemb.table": "registers",
}


@dataclass(frozen=True)
class Start:
    """What a run starts from: a name, a digest of its weights, how many ``new`` values which parameters hold, and how
    many there are in all."""

    reference: str
    digest: str
    new: dict[str, int]
    total: int

    def describe(self) -> str:
        count = sum(self.new.values())
        parts = ", ".join(f"{name} ({n:,} values)" for name, n in self.new.items())
        return f"from {self.reference}: {self.total - count:,} values reused, " + (
            f"new: {parts}" if parts else "none new"
        )


def tokenizer(reference: str, registers: int = 0, size: int = 0, frames: int = 0) -> tuple[Tokenizer, Start]:
    """A tokenizer in training with the weights of a checkpoint; registers, working size and frames of a chunk as given,
    0 for those of the checkpoint.

    Raises:
        ValueError: a size that the checkpoint's stored (sincos) tables do not cover.
        CheckpointError, ConfigError (both ValueError): the checkpoint cannot be read.
    """
    old = Tokenizer.from_pretrained(reference)
    model = Tokenizer(parse_config(_resized(old, registers, size, frames)), old.name)
    model.steps, model.guidance, model._codec_state = old.steps, old.guidance, old.codec_state
    new = {}
    for (name, parameter), before in zip(model.named_parameters(), old.parameters(), strict=True):
        both = tuple(slice(min(a, b)) for a, b in zip(parameter.shape, before.shape, strict=True))
        parameter.data[both] = before[both]
        if added := parameter.numel() - parameter[both].numel():
            new[name] = added
    return model.train(), Start(
        reference, digest(old.named_parameters()), new, sum(p.numel() for p in model.parameters())
    )


def _resized(old: Tokenizer, registers: int, size: int, frames: int) -> dict:
    """The checkpoint's config with other sizes; what its tables cover already stays."""
    config, raw = old.config, copy.deepcopy(old.config.raw)
    registers, size, frames = registers or config.registers, size or config.size, frames or config.chunk_size
    # a codec's shapes need no weights: 1 + 4 k frames, an eighth of the side
    latent = (1 + (frames - 1) // 4) // config.patch[0], *((size or 0) // 8 // p for p in config.patch[1:])
    tree = next((raw[k] for k in ("video_flex_tok", "video_tokenizer") if k in raw), raw)
    entry = _entry(tree, config, "encoder.registers")
    if registers != config.registers:
        entry.pop("n_eval", None)
        entry["n_max"] = registers
    entry["t_max"] = max(config.max_frames, latent[0])
    for name, what in _TABLES.items():
        table = old.get_parameter(name) if name in config.names else None
        if table is not None:
            _grow(_entry(tree, config, name), latent if what == "patches" else (latent[0], registers), name)
    if frames != config.chunk_size:
        raw["chunk_size"] = frames
    if config.size is not None or "video_preprocess_args" in raw:
        raw["video_preprocess_args"] = dict(raw.get("video_preprocess_args") or {}) | {
            "size": config.size and size, "chunk_size": frames,
        }  # fmt: skip
    return raw


def _entry(tree: dict, config: TokenizerConfig, name: str) -> dict:
    side, _, module, _ = config.names[name].split(".")
    return tree[side]["module_dict"][module]


def _grow(entry: dict, grid: tuple[int, ...], name: str) -> None:
    sizes = list(entry["max_sizes"])
    grid = grid[-len(sizes) :]
    if entry.get("posemb_type", "sincos") != "sincos":
        entry["max_sizes"] = [max(*sizes, *grid)] * len(sizes)
    elif any(n > size for n, size in zip(grid, sizes, strict=True)):
        raise ValueError(
            f"{name} must cover a grid of {list(grid)}, got a stored table of {sizes}: choose smaller sizes"
        )


class Weights(NamedTuple):
    """A generator's checkpoint as it is stored: the config, and tensors, where those of tokens may be projections."""

    config: dict
    tensors: dict[str, torch.Tensor]


def read_generator(reference: str) -> Weights:
    """Reads a checkpoint. Raises CheckpointError or ConfigError where it is none of a generator."""
    config, tensors, _ = checkpoint.read(reference, checkpoint.GENERATOR)
    _config(config)
    return Weights(config, tensors)


def _config(raw: dict) -> GeneratorConfig:
    return parse_generator_config({key: value for key, value in raw.items() if key != "fsq_levels"})


def generator_config(before: dict, now: dict) -> dict:
    """The config of a generator that continues one of config ``before`` on the data and tokenizer that ``now`` states.

    Raises ValueError where these do not fit.
    """
    old = _config(before)
    for name, value in (("condition", old.cond), ("vocab", old.vocab), ("ctx_dim", old.ctx_dim)):
        given = now.get("cond" if name == "condition" else name, 0)
        if given != value:
            raise ValueError(f"{name} must be that of the checkpoint, {value!r}, got {given!r}")
    if old.fingerprint not in (None, now["fingerprint"]):
        raise ValueError(
            f"the generator's tokens are those of a tokenizer of fingerprint {old.fingerprint}, got "
            f"{now['tokenizer']!r} of {now['fingerprint']}"
        )
    kept = {name: getattr(old, name) for name in ("depth", "head_bias", "n_ctx_null")}
    return now | {name: value for name, value in kept.items() if name in before}


def generator(model: Generator, reference: str, weights: Weights) -> Start:
    """Fills a new generator with the tensors of a checkpoint.

    Classes are found by their names; position (register, frame) is that of the checkpoint's, or of its last frame.

    Raises CheckpointError naming a tensor that is missing or has another shape.
    """
    before, tensors = _config(weights.config), weights.tensors
    wanted, rows = model.published(), {"pos_emb": _positions(before, model.config)}
    if model.cls_emb is not None:
        rows["cls_emb.weight"] = _classes(before, model.config)
    checkpoint.fill({name: p for name, p in wanted.items() if name not in rows}, _without(tensors, rows))
    new = {}
    for name, index in rows.items():
        known = torch.tensor([i is not None for i in index])
        wanted[name][known] = tensors[name].float()[[i for i in index if i is not None]]
        if not known.all():
            new[name] = int((~known).sum()) * wanted[name].shape[1]
    return Start(reference, digest(tensors.items()), new, sum(p.numel() for p in model.parameters()))


def _without(tensors: dict, names) -> dict:
    return {name: value for name, value in tensors.items() if name not in names}


def _positions(before, now) -> list[int | None]:
    """For each position of the new model the one of the old that stood for the same register and frame."""
    old, new = before.trained_frames, now.trained_frames
    found = [i // new * old + min(i % new, old - 1) for i in range(now.seq_len + 1)]
    return [i if i <= before.seq_len else None for i in found]


def _classes(before, now) -> list[int | None]:
    # unnamed classes are told apart by their number alone
    numbers = {name: i for i, name in enumerate(before.classes)}
    same = before.n_classes == now.n_classes and not before.classes
    known = [i if same else numbers.get(name) for i, name in enumerate(now.classes)]
    return [*known, before.n_classes]


def digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """16 hexadecimal digits for named weights, of which some values are looked at."""
    found = hashlib.sha256()
    add_tensors(found, sorted(named))
    return found.hexdigest()[:16]

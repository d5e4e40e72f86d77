"""Where a run that continues a checkpoint starts: its weights, in a model that may have other sizes.

What both models have is reused; tables that grow (registers, positions, classes) keep their entries, and the new ones
start as those of a new model do, registers at the places of earlier ones; a generator of classes may become one of
captions. Nothing else may differ.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .. import checkpoint
from ..codec import LAPPED, LINEAR
from ..config import GeneratorConfig, TokenizerConfig, parse_config, parse_generator_config
from ..fingerprint import add_tensors
from ..generator import Generator
from ..layers import patchify
from ..tokenizer import Tokenizer
from . import initial, loss

# of learned positions: dictionary entries in the published config
_TABLES = {
    "encoder.patch_posemb.table": "patches",
    "decoder.patch_posemb.table": "patches",
    "decoder.register_posemb.table": "registers",
}
# axes in which the channels of a patch lie, the fastest of its values
_CHANNELS = {
    "encoder.patch_embed.weight": 1, "decoder.patch_embed.weight": 1, "decoder.head.weight": 0, "decoder.head.bias": 0,
}  # fmt: skip
# what a generator of captions has and one of classes lacks
_CAPTIONS = re.compile(r"^ctx_|\.nx\.|\.xattn\.")
# (before, after): codecs whose first channels are those of another, see :func:`vft.train.codec.follow`
_FOLLOWS = {(LINEAR, LAPPED), (LAPPED, LAPPED)}


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


def tokenizer(
    reference: str, registers: int = 0, size: int = 0, frames: int = 0, codec: str = "", channels: int = 0
) -> tuple[Tokenizer, Start]:
    """A tokenizer in training with the weights of a checkpoint; registers, working size, frames of a chunk and latent
    codec as given, 0 and "" for those of the checkpoint.

    The first ``channels`` of another codec must begin with those of the checkpoint's, as "lapped" does with "linear":
    the encoder starts blind to new ones, and the decoder without a velocity for them, see :func:`fit_new_channels`.

    Raises:
        ValueError: a size that the checkpoint's stored (sincos) tables do not cover; a codec that does not follow its.
        CheckpointError, ConfigError (both ValueError): the checkpoint cannot be read.
    """
    old = Tokenizer.from_pretrained(reference)
    model = Tokenizer(parse_config(_resized(old, registers, size, frames, codec, channels)), old.name)
    model.steps, model.guidance = old.steps, old.guidance
    # a codec that follows another is an embedded one, whose refiner looks at pixels
    model._codec_state = old.codec_state
    new = {}
    for (name, parameter), before in zip(model.named_parameters(), old.parameters(), strict=True):
        now, before = _by_channel(name, parameter.data, model.config), _by_channel(name, before.data, old.config)
        both = tuple(slice(min(a, b)) for a, b in zip(now.shape, before.shape, strict=True))
        if name in _CHANNELS and now.shape != before.shape and not name.startswith("decoder.patch"):
            now.zero_()
        now[both] = before[both]
        if added := now.numel() - now[both].numel():
            new[name] = added
    _place_registers(model, old)
    return model.train(), Start(
        reference, digest(old.named_parameters()), new, sum(p.numel() for p in model.parameters())
    )


@torch.no_grad()
def _place_registers(model: Tokenizer, old: Tokenizer) -> None:
    """New registers look where those of the checkpoint do, by turns: they take the channels that
    :mod:`vft.train.initial` keeps for places. In the others they are random, as far apart as those are, so that they
    say something else of the same place."""
    known, patch = old.registers, old.config.patch
    rows, columns = (old.size // 8 // p for p in patch[1:]) if old.size else (0, 0)
    if model.registers <= known or not rows * columns or not initial.fits(old, rows, columns):
        return
    places = initial.Codes(old.config.max_frames, rows, columns).count
    # [frames, registers, width] and [registers, width]
    for table in (model.encoder.registers, model.decoder.register_posemb.table[1, 0].T):
        spread = table[..., :known, places:].std()
        for i in range(known, model.registers):
            table[..., i, :places] = table[..., i % known, :places]
            table[..., i, places:] = spread * torch.randn(table.shape[-1] - places)


@torch.no_grad()
def fit_new_channels(model: Tokenizer, latents: list[torch.Tensor], seed: int = 0) -> None:
    """Gives the decoder a head for channels that it has none for: the velocity of noised ``latents``, each
    ``[C, T, H, W]``, by least squares from what the head reads.
    """
    decoder, read = model.decoder, []
    hook = decoder.head.register_forward_pre_hook(lambda _, args: read.append(args[0].double()))
    choices = loss.draw(latents, model.registers, torch.Generator().manual_seed(seed))
    try:
        loss.flow_loss(model, latents, choices)
    finally:
        hook.remove()
    velocity = [n - x for n, x in zip(choices.noise, latents, strict=True)]
    found = _ridge(read[0], patchify(velocity, model.config.patch).double()).to(decoder.head.weight)
    new = (decoder.head.weight == 0).all(1)
    decoder.head.weight[new] = found[:-1].T[new]
    if decoder.head.bias is not None:
        decoder.head.bias[new] = found[-1][new]


def _ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The matrix ``[n + 1, m]``, its last row a constant, that makes most of y ``[rows, m]`` of x ``[rows, n]``."""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    gram = x.T @ x
    return torch.linalg.solve(gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), x.T @ y)


def _by_channel(name: str, tensor: torch.Tensor, config: TokenizerConfig) -> torch.Tensor:
    """A view of a parameter in which the latents' channels have an axis of their own, where it has them."""
    axis = _CHANNELS.get(name)
    return tensor if axis is None else tensor.unflatten(axis, (-1, config.channels))


def _resized(old: Tokenizer, registers: int, size: int, frames: int, codec: str, channels: int) -> dict:
    """The checkpoint's config with other sizes; what its tables cover already stays."""
    config, raw = old.config, copy.deepcopy(old.config.raw)
    registers, size, frames = registers or config.registers, size or config.size, frames or config.chunk_size
    # a codec's shapes need no weights: 1 + 4 k frames, an eighth of the side
    latent = (1 + (frames - 1) // 4) // config.patch[0], *((size or 0) // 8 // p for p in config.patch[1:])
    tree = modules(raw)
    registers_entry = entry(tree, config, "encoder.registers")
    if codec and (codec, channels) != (config.codec, config.channels):
        if (config.codec, codec) not in _FOLLOWS or channels < config.channels:
            raise ValueError(
                f"codec must be one whose first channels are those of {config.codec!r} of {config.channels}, got "
                f"{codec!r} of {channels}"
            )
        for name, field in (
            ("encoder.patch_embed", "channels_in"), ("decoder.patch_embed", "channels_in"),
            ("decoder.head", "channels_out"),
        ):  # fmt: skip
            entry(tree, config, name)[field] = channels
        tree["vae"]["tokenizer_id"] = codec
    if registers != config.registers:
        registers_entry.pop("n_eval", None)
        registers_entry["n_max"] = registers
    registers_entry["t_max"] = max(config.max_frames, latent[0])
    for name, what in _TABLES.items():
        table = old.get_parameter(name) if name in config.names else None
        if table is not None:
            _grow(entry(tree, config, name), latent if what == "patches" else (latent[0], registers), name)
    if frames != config.chunk_size:
        raw["chunk_size"] = frames
    if config.size is not None or "video_preprocess_args" in raw:
        raw["video_preprocess_args"] = dict(raw.get("video_preprocess_args") or {}) | {
            "size": config.size and size, "chunk_size": frames,
        }  # fmt: skip
    return raw


def modules(raw: dict) -> dict:
    """The part of a published config that has the modules."""
    return next((raw[k] for k in ("video_flex_tok", "video_tokenizer") if k in raw), raw)


def entry(tree: dict, config: TokenizerConfig, name: str) -> dict:
    """The options of the module that holds a parameter, in :func:`modules`."""
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


def generator_config(before: dict, now: dict, force: bool = False) -> dict:
    """The config of a generator that continues one of config ``before`` on the data and tokenizer that ``now`` states.
    One of classes may go on as one of captions.

    Raises ValueError where these do not fit; with ``force`` not where the tokenizer's weights alone are others.
    """
    old = _config(before)
    added = _new_captions(old.cond, now["cond"])
    for name, value in (("condition", old.cond), ("vocab", old.vocab), ("ctx_dim", old.ctx_dim)):
        given = now.get("cond" if name == "condition" else name, 0)
        if given != value and not (added and name != "vocab"):
            raise ValueError(f"{name} must be that of the checkpoint, {value!r}, got {given!r}")
    if not force and old.fingerprint not in (None, now["fingerprint"]):
        raise ValueError(
            f"the generator's tokens are those of a tokenizer of fingerprint {old.fingerprint}, got "
            f"{now['tokenizer']!r} of {now['fingerprint']}; --force goes on all the same"
        )
    kept = ("depth", "head_bias") if added else ("depth", "head_bias", "n_ctx_null")
    return now | {name: getattr(old, name) for name in kept if name in before}


def _new_captions(before: str, now: str) -> bool:
    return (before, now) == ("class", "text")


def generator(model: Generator, reference: str, weights: Weights) -> Start:
    """Fills a new generator with the tensors of a checkpoint.

    Classes are found by their names; position (register, frame) is that of the checkpoint's, or of its last frame.
    Where classes make way for captions, the model starts as that of the null class, whatever the caption.

    Raises CheckpointError naming a tensor that is missing or has another shape.
    """
    before, tensors = _config(weights.config), dict(weights.tensors)
    wanted, rows, new = model.published(), {"pos_emb": _positions(before, model.config)}, {}
    sizes = {"sos": (before.width,), "pos_emb": (before.seq_len + 1, before.width)}
    if before.cond == "class":
        sizes["cls_emb.weight"] = before.n_classes + 1, before.width
    for name, size in sizes.items():
        if name not in tensors or tensors[name].shape != size:
            found = list(tensors[name].shape) if name in tensors else "none"
            raise checkpoint.CheckpointError(f"{name} must be [{', '.join(map(str, size))}], got {found}")
    if model.cls_emb is not None:
        rows["cls_emb.weight"] = _classes(before, model.config)
    if _new_captions(before.cond, model.config.cond):
        new = {name: wanted.pop(name).numel() for name in list(wanted) if _CAPTIONS.search(name)}
        for block in model.blocks:
            nn.init.zeros_(block.xattn.proj.weight)
        # in one dtype, so that a half-precision checkpoint's sum is not rounded again
        tensors["sos"] = tensors["sos"].float() + tensors.pop("cls_emb.weight")[before.n_classes].float()
    checkpoint.fill({name: p for name, p in wanted.items() if name not in rows}, _without(tensors, rows))
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

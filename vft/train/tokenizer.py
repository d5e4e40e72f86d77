"""``vft train tokenizer``: trains a tokenizer on procedural video or a folder of videos, whose latents are kept."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import flexkernels

from ..codec import LAPPED, LINEAR
from ..config import make_config, parse_config
from ..lapped import CHANNELS
from ..tokenizer import Tokenizer
from ..vae import load_codec
from . import data, initial, listen, loop, lora, start, teach
from .loop import Engine, Settings
from .loss import draw, edge_error, flow_loss

# a new model: 64x64, 17 frames, 5 latent frames of 8x8, 32 registers each
TINY = {
    "codec": "linear", "encoder_width": 192, "encoder_depth": 3, "decoder_width": 192, "decoder_depth": 4,
    "registers": 32, "grid": 8, "size": 64,
}  # fmt: skip
# solver steps that a trained model states as its default, without guidance: a model this small is closest to its source
# in one step, which gives the mean of all that fits the tokens
STEPS = 1


# codecs that a tokenizer may be trained with from this command, and their channels unless others are asked for: those
# of a patch must fit into the width beside the codes of :mod:`vft.train.initial`
CODECS = {LINEAR: 16, LAPPED: 24}

# clips that linear codes for new registers are fitted to
LESSONS = 1024
# of them, from which the decoder's new blocks are solved for
EXAMPLES = 96


@dataclass(frozen=True)
class TokenizerSettings(Settings):
    """``registers`` of each latent frame; 0: as many as the config, or the checkpoint, has. ``edges``: weight of
    :func:`vft.train.loss.edge_error`, for linear codecs. ``early``: share of the samples with few registers whose
    number has density 1 / k, see :func:`vft.train.loss.draw`. ``codec`` and its ``channels``: of a checkpoint that goes
    on with another codec, see :func:`vft.train.start.tokenizer`; empty and 0 for its own. ``teach``: the encoder alone,
    which learns what registers that the checkpoint lacks should say, see :mod:`vft.train.teach`. ``freeze_encoder``:
    the decoder alone, for the checkpoint's tokens."""

    registers: int = 0
    codec: str = ""
    channels: int = 0
    edges: float = 0.0
    early: float = 0.0
    teach: bool = False
    freeze_encoder: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train tokenizer`` beyond the common ones."""
    defaults, add = TokenizerSettings(), parser.add_argument
    loop.add_arguments(parser, defaults)
    add("--registers", type=int, default=0, help="of a latent frame (default 32, or the checkpoint's)")
    add("--codec", choices=CODECS, help=f"of the latents (default {TINY['codec']}, or the checkpoint's)")
    add("--channels", type=int, default=0, choices=CHANNELS, help=f"of the codec lapped (default {CODECS[LAPPED]})")
    add("--edges", type=float, default=defaults.edges, help="weight of errors in edges (default %(default)s)")
    add(
        "--early", type=float, default=defaults.early,
        help="share of samples whose few registers are mostly the first ones (default %(default)s)",
    )  # fmt: skip
    add(
        "--teach", action="store_true",
        help="with --from and more --registers: teach the encoder to say linear codes of patches with new ones",
    )  # fmt: skip
    add(
        "--freeze-encoder", action="store_true",
        help="with --from: train the decoder alone; tokens made before stay valid",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say; returns the exit code."""
    if args.channels and args.codec != LAPPED:
        raise ValueError(f"--channels must come with --codec {LAPPED}, got {args.channels}")
    name = args.codec or TINY["codec"]
    changes = {"codec": name, "channels": args.channels or CODECS[name]}
    # a checkpoint keeps its codec unless another is asked for
    codec = changes if args.start and args.codec else {}
    settings = TokenizerSettings(
        **loop.common(args), registers=args.registers, edges=args.edges, early=args.early, teach=args.teach,
        freeze_encoder=args.freeze_encoder, **codec,
    )  # fmt: skip
    if settings.registers > 0:
        changes["registers"] = settings.registers
    return loop.run(args, settings, partial(train, config=make_config(**TINY | changes)))


def train(
    folder: Path,
    settings: TokenizerSettings,
    *,
    config: dict,
    minutes: float | None = None,
    engine: Engine | None = None,
) -> None:
    """Trains or resumes the run in ``folder``, of a new model of ``config`` or of the checkpoint ``settings.start``.

    Errors are those of :func:`vft.train.loop.train`.
    """
    loop.check(settings)
    if settings.registers < 0:
        raise ValueError(f"registers must be at least 0, got {settings.registers}")
    if not 0 <= settings.edges < math.inf:
        raise ValueError(f"edges must be at least 0 and finite, got {settings.edges}")
    if not 0 <= settings.early <= 1:
        raise ValueError(f"early must lie between 0 and 1, got {settings.early}")
    _check_parts(settings)
    torch.manual_seed(settings.seed)
    loop.train(folder, settings, TokenizerTask(settings, config), minutes, engine)


def _check_parts(settings: TokenizerSettings) -> None:
    """Raises ValueError for settings that do not go with the training of one part."""
    for name in ("teach", "freeze_encoder"):
        if getattr(settings, name) and not settings.start:
            raise ValueError(f"{name} needs a checkpoint to start from")
    if settings.teach:
        for name in ("freeze_encoder", "codec", "lora", "edges", "early", "corruption"):
            if getattr(settings, name):
                raise ValueError(f"{name} must not be given with teach, got {getattr(settings, name)!r}")
        for name in ("sizes", "frames"):
            if len(getattr(settings, name)) > 1:
                raise ValueError(f"{name} must be one with teach, got {list(getattr(settings, name))}")


class TokenizerTask:
    """Rectified flow with nested dropout; see :mod:`vft.train.loss`."""

    example = "vft reconstruct VIDEO -o out.mp4 --model {}"
    # the class of a new model, and of its average
    made = Tokenizer

    def __init__(self, settings: TokenizerSettings, config: dict) -> None:
        self.settings, self.start, self.teacher = settings, None, None
        if settings.start:
            sizes = settings.registers, max(settings.sizes, default=0), max(settings.frames, default=0)
            self.model, self.start = start.tokenizer(settings.start, *sizes, settings.codec, settings.channels)
            codec = self.model.codec
        else:
            self.model = self.made(parse_config(config), "tiny").train()
            # a model this small is closest to its source in one step
            self.model.steps, self.model.guidance = STEPS, None
            codec = load_codec(self.model.config.codec, channels=self.model.config.channels)
        config = self.model.config
        if codec.channels != config.channels:
            raise ValueError(f"the config must have the codec's {codec.channels} channels, got {config.channels}")
        if settings.edges and not getattr(codec, "linear", False):
            raise ValueError(f"edges must be 0 with {codec.name!r}, which is not linear, got {settings.edges}")
        self.codec = codec.requires_grad_(False)
        self.data = data.clips(self._encode, settings, config.chunk_size, self.model.size)
        if self.start is None:
            self._begin()
        elif settings.codec:
            first = [x.to(self.model.device) for x in self.data.batch(range(min(64, settings.clips)))]
            start.fit_new_channels(self.model, first)
        if settings.lora:
            lora.add(self.model, settings.lora, set(self.start.new))
        if settings.teach:
            self._learn_from(Tokenizer.from_pretrained(settings.start))
        if settings.freeze_encoder:
            if changed := [name for name in self.start.new if name.startswith("encoder.")]:
                raise ValueError(f"freeze_encoder needs the checkpoint's sizes and codec, but {changed[0]} is new")
            self.model.encoder.requires_grad_(False)

    def _learn_from(self, old: Tokenizer) -> None:
        if self.model.registers <= old.registers:
            raise ValueError(f"teach needs more registers than {old.registers}, got {self.model.registers}")
        clips = self.data.batch(range(min(LESSONS, self.settings.clips)))
        latents = torch.stack([x.cpu() for x in clips])
        self.teacher = teacher = teach.Teacher(self.model, old, latents, self.settings.seed)
        if listen.fits(self.model, teacher.groups, *teacher.grid):
            self.model = listen.grown(self.model)
            added = sum(p.numel() for block in self.model.decoder.blocks[: listen.BLOCKS] for p in block.parameters())
            new, total = self.start.new | {"decoder.blocks": added}, self.start.total + added
            self.start = replace(self.start, new=new, total=total)
            examples = latents[:EXAMPLES]
            codes, _ = flexkernels.fsq_quantize(teacher.values(list(examples)), self.model.config.levels, ids=False)
            listen.solve(self.model, old.registers, len(teacher.order), codes, examples)
        self.model.decoder.requires_grad_(False)

    def _begin(self) -> None:
        model, config, settings = self.model, self.model.config, self.settings
        size = model.size or min(settings.sizes)
        shape = self.codec.latent_shape(config.chunk_size, size, size)
        rows, columns = (n // p for n, p in zip(shape[2:], config.patch[1:], strict=True))
        if initial.fits(model, rows, columns):
            initial.start(model, rows, columns, self.data.batch(range(min(64, settings.clips))))

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.codec.to(pixels.device).encode(pixels)

    def recompute(self, on: bool) -> None:
        self.model.encoder.recompute = self.model.decoder.recompute = on

    def indices(self, generator: torch.Generator) -> list[int]:
        return torch.randint(self.settings.clips, (self.settings.batch,), generator=generator).tolist()

    def loss(self, generator: torch.Generator, part: slice = slice(None)) -> torch.Tensor:
        indices, settings, model = self.indices(generator)[part], self.settings, self.model
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            latents = [x.to(device) for x in self.data.batch(indices)]
        if self.teacher is not None:
            return self.teacher.loss(model, latents)
        choices = draw(
            latents, model.registers, generator, corruption=settings.corruption, codebook=model.config.codebook_size,
            batch=settings.batch, first=part.start or 0, early_probability=settings.early,
        )  # fmt: skip
        return flow_loss(model, latents, choices, self._weigh, self._edges if settings.edges else None)

    def _edges(self, difference: torch.Tensor) -> torch.Tensor:
        codec = self.codec.to(difference.device)
        with torch.autocast(difference.device.type, enabled=False):
            return self.settings.edges * edge_error(codec, difference)

    def _weigh(self, frames: int) -> torch.Tensor | None:
        weight = self.codec.pixel_weight(frames)
        return None if weight is None else weight.to(self.model.device)

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        averaged = self.made(self.model.config, self.model.name)
        averaged.load_state_dict(lora.merged(weights))
        averaged.steps, averaged.guidance = self.model.steps, self.model.guidance
        averaged.save(path, self._stored(averaged), codec=self.model.codec_state)

    def _stored(self, model: Tokenizer) -> torch.dtype:
        """float16, unless that would round the encoder that tokens were made with."""
        if not self.settings.freeze_encoder:
            return torch.float16
        exact = all(torch.equal(p, p.half().float()) for p in model.encoder.parameters())
        return torch.float16 if exact else torch.float32

"""``vft train tokenizer``: trains a tokenizer on procedural video or a folder of videos, whose latents are kept."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..config import make_config, parse_config
from ..tokenizer import Tokenizer
from ..vae import load_codec
from . import data, initial, loop, lora, start
from .loop import Engine, Settings
from .loss import draw, flow_loss

# the embedded model: 64x64, 17 frames, 5 latent frames of 8x8, 32 registers each
TINY = {
    "codec": "linear", "encoder_width": 192, "encoder_depth": 3, "decoder_width": 192, "decoder_depth": 4,
    "registers": 32, "grid": 8, "size": 64,
}  # fmt: skip
# solver steps that a trained model states as its default, without guidance: a model this small is closest to its source
# in one step, which gives the mean of all that fits the tokens
STEPS = 1


@dataclass(frozen=True)
class TokenizerSettings(Settings):
    """``registers`` of each latent frame; 0: as many as the config, or the checkpoint, has."""

    registers: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train tokenizer`` beyond the common ones."""
    loop.add_arguments(parser, TokenizerSettings())
    parser.add_argument("--registers", type=int, default=0, help="of a latent frame (default 32, or the checkpoint's)")


def run(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say; returns the exit code."""
    settings = TokenizerSettings(**loop.common(args), registers=args.registers)
    config = make_config(**TINY | ({"registers": settings.registers} if settings.registers > 0 else {}))
    return loop.run(args, settings, partial(train, config=config))


def train(
    folder: Path, settings: Settings, *, config: dict, minutes: float | None = None, engine: Engine | None = None
) -> None:
    """Trains or resumes the run in ``folder``, of a new model of ``config`` or of the checkpoint ``settings.start``.

    Errors are those of :func:`vft.train.loop.train`.
    """
    loop.check(settings)
    if getattr(settings, "registers", 0) < 0:
        raise ValueError(f"registers must be at least 0, got {settings.registers}")
    torch.manual_seed(settings.seed)
    loop.train(folder, settings, TokenizerTask(settings, config), minutes, engine)


class TokenizerTask:
    """Rectified flow with nested dropout; see :mod:`vft.train.loss`."""

    example = "vft reconstruct VIDEO -o out.mp4 --model {}"

    def __init__(self, settings: Settings, config: dict) -> None:
        self.settings, self.start = settings, None
        if settings.start:
            sizes = getattr(settings, "registers", 0), max(settings.sizes, default=0), max(settings.frames, default=0)
            self.model, self.start = start.tokenizer(settings.start, *sizes)
            codec = self.model.codec
        else:
            self.model = Tokenizer(parse_config(config), "tiny").train()
            # a model this small is closest to its source in one step
            self.model.steps, self.model.guidance = STEPS, None
            codec = load_codec(self.model.config.codec)
        self.data = data.clips(codec.encode, settings, self.model.config.chunk_size, self.model.size)
        self.codec = codec.requires_grad_(False)
        if self.start is None:
            self._begin()
        elif settings.lora:
            lora.add(self.model, settings.lora, set(self.start.new))

    def _begin(self) -> None:
        model, config, settings = self.model, self.model.config, self.settings
        size = model.size or min(settings.sizes)
        shape = self.codec.latent_shape(config.chunk_size, size, size)
        rows, columns = (n // p for n, p in zip(shape[2:], config.patch[1:], strict=True))
        if initial.fits(model, rows, columns):
            initial.start(model, rows, columns, self.data.batch(range(min(64, settings.clips))))

    def recompute(self, on: bool) -> None:
        self.model.encoder.recompute = self.model.decoder.recompute = on

    def indices(self, generator: torch.Generator) -> list[int]:
        return torch.randint(self.settings.clips, (self.settings.batch,), generator=generator).tolist()

    def loss(self, generator: torch.Generator, part: slice = slice(None)) -> torch.Tensor:
        indices, settings, model = self.indices(generator)[part], self.settings, self.model
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            latents = [x.to(device) for x in self.data.batch(indices)]
        choices = draw(
            latents, model.registers, generator, corruption=settings.corruption, codebook=model.config.codebook_size,
            batch=settings.batch, first=part.start or 0,
        )  # fmt: skip
        return flow_loss(model, latents, choices, self._weigh)

    def _weigh(self, frames: int) -> torch.Tensor | None:
        weight = self.codec.pixel_weight(frames)
        return None if weight is None else weight.to(self.model.device)

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        averaged = Tokenizer(self.model.config, self.model.name)
        averaged.load_state_dict(lora.merged(weights))
        averaged.steps, averaged.guidance = self.model.steps, self.model.guidance
        averaged.save(path, torch.float16, codec=self.model.codec_state)

"""``vft train tokenizer``: trains a tokenizer on procedural video. Latents of rendered clips are kept (20 kB each)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..config import make_config, parse_config
from ..tokenizer import Tokenizer
from ..vae import load_codec
from . import initial, loop
from .loop import Settings
from .loss import draw, flow_loss

# the embedded model: 64x64, 17 frames, 5 latent frames of 8x8, 32 registers each
TINY = {
    "codec": "linear", "encoder_width": 192, "encoder_depth": 3, "decoder_width": 192, "decoder_depth": 4,
    "registers": 32, "grid": 8, "size": 64,
}  # fmt: skip
# solver steps that a trained model states as its default; without guidance, which costs PSNR
STEPS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train tokenizer`` beyond the common ones."""
    loop.add_arguments(parser, Settings())


def run(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say; returns the exit code."""
    train(args.output, Settings(**loop.common(args)), minutes=args.minutes, config=make_config(**TINY))
    return 0


def train(folder: Path, settings: Settings, *, config: dict, minutes: float | None = None) -> None:
    """Trains or resumes the run in ``folder``; errors are those of :func:`vft.train.loop.train`."""
    loop.check(settings)
    torch.manual_seed(settings.seed)
    loop.train(folder, settings, TokenizerTask(settings, config), minutes)


class TokenizerTask:
    """Rectified flow with nested dropout; see :mod:`vft.train.loss`."""

    def __init__(self, settings: Settings, config: dict) -> None:
        self.settings, self.model = settings, Tokenizer(parse_config(config), "tiny").train()
        codec, model = load_codec(self.model.config.codec), self.model
        self.data = loop.Clips(codec.encode, settings.seed, model.size, model.config.chunk_size)
        shape = codec.latent_shape(model.config.chunk_size, model.size, model.size)
        self.weight = codec.pixel_weight(shape[1])
        rows, columns = (n // p for n, p in zip(shape[2:], model.config.patch[1:], strict=True))
        if initial.fits(model, rows, columns):
            initial.start(model, rows, columns, self.data.batch(list(range(min(64, settings.clips)))))

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        indices = torch.randint(self.settings.clips, (self.settings.batch,), generator=generator).tolist()
        with torch.autocast("cpu", enabled=False):
            latents = self.data.batch(indices)
        return flow_loss(self.model, latents, draw(latents, self.model.registers, generator), self.weight)

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        averaged = Tokenizer(self.model.config, self.model.name)
        averaged.load_state_dict(weights)
        averaged.steps, averaged.guidance = STEPS, None
        averaged.save(path, torch.float16)

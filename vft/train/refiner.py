"""``vft train refiner``: trains the network that goes over a tokenizer's decoded frames, see :mod:`vft.refiner`.

The tokenizer stays as it is, and so do its tokens. The network learns to undo what is lost between a clip and its
reconstruction in one solver step without guidance from the first k registers, k of density 1 / k, or from the codec
alone.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..codec import EMBEDDED
from ..refiner import Refiner
from ..tokenizer import Tokenizer
from . import data, loop
from .loop import Engine, Settings
from .start import Start, digest

# share of samples that the codec alone has coded
CODEC_SHARE = 0.1


@dataclass(frozen=True)
class RefinerSettings(Settings):
    """``tokenizer``: whose frames are refined; the run's model is this with the network. ``edges``: weight of errors in
    steps between neighbouring pixels, beside 1 for those of pixels."""

    steps: int = 1000
    clips: int = 8000
    learning_rate: float = 2e-3
    warmup: int = 50
    ema: float = 0.99
    optimizer: str = "adamw"
    tokenizer: str = "tiny"
    edges: float = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train refiner`` beyond the common ones."""
    defaults = RefinerSettings()
    loop.add_arguments(parser, defaults, ("--from", "--lora", "--corruption", "--optimizer", "--checkpoint"))
    parser.add_argument("--tokenizer", default=defaults.tokenizer, help="whose frames to refine (default %(default)s)")
    parser.add_argument(
        "--edges", type=float, default=defaults.edges, help="weight of errors in edges (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say; returns the exit code."""
    settings = RefinerSettings(**loop.common(args), tokenizer=args.tokenizer, edges=args.edges)
    return loop.run(args, settings, train)


def train(
    folder: Path, settings: RefinerSettings, *, minutes: float | None = None, engine: Engine | None = None
) -> None:
    """Trains or resumes the run in ``folder``; errors are those of :func:`vft.train.loop.train`."""
    loop.check(settings)
    if settings.start:
        raise ValueError(f"start must be empty, a refiner is new: give --tokenizer, not --from {settings.start}")
    if settings.corruption:
        raise ValueError(f"corruption must be 0, got {settings.corruption}")
    if settings.optimizer != "adamw":
        raise ValueError(f"optimizer must be adamw, as a refiner has no blocks, got {settings.optimizer!r}")
    if engine is not None and engine.checkpoint:
        raise ValueError("checkpoint must be off: a refiner's activations are small")
    if not 0 <= settings.edges < math.inf:
        raise ValueError(f"edges must be at least 0 and finite, got {settings.edges}")
    torch.manual_seed(settings.seed)
    loop.train(folder, settings, RefinerTask(settings), minutes, engine)


class Refining(nn.Module):
    """What the loop trains: the refiner; the tokenizer beside it is none of its parameters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.refiner = Refiner()
        object.__setattr__(self, "tokenizer", tokenizer)
        self.config = tokenizer.config

    def _apply(self, fn, recurse=True):
        self.tokenizer._apply(fn, recurse)
        return super()._apply(fn, recurse)


class RefinerTask:
    """Squared error of refined reconstructions, and of their steps from pixel to pixel."""

    example = "vft reconstruct VIDEO -o out.mp4 --model {}"
    start: Start | None

    def __init__(self, settings: RefinerSettings) -> None:
        self.settings = settings
        tokenizer = Tokenizer.from_pretrained(settings.tokenizer)
        if tokenizer.config.codec not in EMBEDDED:
            raise ValueError(f"tokenizer must have an embedded codec to be refined, got {tokenizer.config.codec!r}")
        if tokenizer.size is None:
            raise ValueError(f"tokenizer {tokenizer.name!r} must have a working size")
        # the new refiner sees frames that no other went over
        tokenizer.codec.refiner = None
        self.model = Refining(tokenizer)
        counts = [sum(p.numel() for p in part.parameters()) for part in (self.model.refiner, tokenizer)]
        weights = digest(tokenizer.named_parameters())
        self.start = Start(settings.tokenizer, weights, {"refiner": counts[0]}, sum(counts))
        self.data = data.clips(_bytes, settings, tokenizer.config.chunk_size, tokenizer.size)

    def recompute(self, on: bool) -> None:
        """Nothing to do: see :func:`train`."""

    def indices(self, generator: torch.Generator) -> list[int]:
        return torch.randint(self.settings.clips, (self.settings.batch,), generator=generator).tolist()

    def loss(self, generator: torch.Generator, part: slice = slice(None)) -> torch.Tensor:
        model, settings = self.model, self.settings
        tokenizer, batch = model.tokenizer, settings.batch
        indices = self.indices(generator)[part]
        # k of density 1 / k, so that few and many registers count alike
        keep = ((tokenizer.registers + 1) ** torch.rand(batch, generator=generator)).long()
        alone = torch.rand(batch, generator=generator) < CODEC_SHARE
        seeds = torch.randint(2**31, (batch,), generator=generator)[part].tolist()
        device = next(model.parameters()).device
        clips = [pixels.to(device).float() / 127.5 - 1 for pixels in self.data.batch(indices)]
        keep, alone = keep.clamp(max=tokenizer.registers)[part].tolist(), alone[part].tolist()
        errors = []
        for shape in dict.fromkeys(clip.shape for clip in clips):
            alike = [i for i, clip in enumerate(clips) if clip.shape == shape]
            wanted = torch.stack([clips[i] for i in alike])
            with torch.autocast(device.type, enabled=False):
                shown = self._reconstructed(wanted, *([x[i] for i in alike] for x in (keep, alone, seeds)))
            difference = model.refiner(shown).float() - wanted
            steps = sum(difference.diff(dim=axis).square().mean((1, 2, 3, 4)) for axis in (-1, -2))
            errors.append(difference.square().mean((1, 2, 3, 4)) + settings.edges * steps)
        return torch.cat(errors).mean()

    @torch.no_grad()
    def _reconstructed(self, clips: torch.Tensor, keep: list[int], alone: list[bool], seeds: list[int]) -> torch.Tensor:
        """Clips ``[B, 3, T, H, W]`` by their first ``keep`` registers, in one step, or by the codec ``alone``."""
        tokenizer = self.model.tokenizer
        latents = tokenizer.codec.encode(clips)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.randn(latents[0].shape, generator=generator).to(latents.device) for generator in draws]
        decoded = tokenizer.decode_latents(tokenizer.encode_latents(latents), keep, 1, None, noise=noise)
        shown = [z if codec else d for z, d, codec in zip(latents, decoded, alone, strict=True)]
        return tokenizer.codec.decode(torch.stack(shown))

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        # named as in a checkpoint: refiner.PREFIX and the network's own names
        tokenizer = self.model.tokenizer
        tokenizer.save(path, torch.float16 if _half(tokenizer) else torch.float32, codec=weights)


def _bytes(pixels: torch.Tensor) -> torch.Tensor:
    # float [B, 3, T, H, W] -> uint8: a quarter of the memory
    return ((pixels + 1) * 127.5).round().byte()


def _half(tokenizer: Tokenizer) -> bool:
    """Whether float16 holds the weights, so that the fingerprint stays."""
    return all(torch.equal(p, p.half().to(p.dtype)) for p in tokenizer.parameters())

"""``vft train generator``: trains a class-conditional generator on the tokens of procedural video.

Cross-entropy of the time-first ids of each clip given its motion family, which is dropped for the null class now and
then so that guidance works. Tokens of rendered clips are kept. With ``factor_rank`` the two token tables are trained
and stored as thin factors (vft/factors.py).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..checkpoint import write_tensors
from ..config import GeneratorConfig, parse_generator_config
from ..factors import FactoredEmbedding, FactoredHead, compress, fsq_features
from ..generator import Generator, time_first
from ..tokenizer import Tokenizer
from . import loop, procedural
from .loop import Settings


@dataclass(frozen=True)
class GeneratorSettings(Settings):
    """``tokens_per_frame`` registers of each latent frame are modelled; depth d means width 64 d.

    ``factor_rank`` r makes the token tables ``[vocab, r] @ [r, width]``; None keeps them whole.
    """

    learning_rate: float = 1e-3
    tokenizer: str = "tiny"
    depth: int = 4
    tokens_per_frame: int = 16
    class_dropout: float = 0.1
    factor_rank: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train generator`` beyond the common ones."""
    defaults = GeneratorSettings()
    loop.add_arguments(parser, defaults)
    parser.add_argument("--tokenizer", default=defaults.tokenizer, help="whose ids to model (default %(default)s)")
    parser.add_argument("--depth", type=int, default=defaults.depth, help="blocks and heads (default %(default)s)")
    parser.add_argument(
        "-k", "--tokens-per-frame", type=int, default=defaults.tokens_per_frame,
        help="registers of each latent frame (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--class-dropout", type=float, default=defaults.class_dropout,
        help="how often the class is dropped (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--factor-rank", type=int, default=defaults.factor_rank,
        help="rank of the token tables, for a small file (default: whole tables)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say; returns the exit code."""
    settings = GeneratorSettings(
        **loop.common(args), tokenizer=args.tokenizer, depth=args.depth, tokens_per_frame=args.tokens_per_frame,
        class_dropout=args.class_dropout, factor_rank=args.factor_rank,
    )  # fmt: skip
    train(args.output, settings, minutes=args.minutes)
    return 0


def train(folder: Path, settings: GeneratorSettings, *, minutes: float | None = None) -> None:
    """Trains or resumes the run in ``folder``; errors are those of :func:`vft.train.loop.train`."""
    loop.check(settings)
    if settings.depth < 1:
        raise ValueError(f"depth must be at least 1, got {settings.depth}")
    if not 0 <= settings.class_dropout <= 1:
        raise ValueError(f"class_dropout must lie between 0 and 1, got {settings.class_dropout}")
    if settings.factor_rank is not None and settings.factor_rank < 1:
        raise ValueError(f"factor_rank must be at least 1, got {settings.factor_rank}")
    tokenizer = Tokenizer.from_pretrained(settings.tokenizer)
    if not 1 <= settings.tokens_per_frame <= tokenizer.registers:
        raise ValueError(f"tokens_per_frame must lie in 1..{tokenizer.registers}, got {settings.tokens_per_frame}")
    if tokenizer.size is None:
        raise ValueError(f"tokenizer {settings.tokenizer!r} must have a working size")
    torch.manual_seed(settings.seed)
    loop.train(folder, settings, GeneratorTask(settings, tokenizer), minutes)


class GeneratorTask:
    """Next-token cross-entropy over the flat ids of procedural clips, with class dropout."""

    def __init__(self, settings: GeneratorSettings, tokenizer: Tokenizer) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        config = tokenizer.config
        frames = tokenizer.codec.latent_shape(config.chunk_size, tokenizer.size, tokenizer.size)[1]
        raw = {
            "depth": settings.depth, "vocab": config.codebook_size, "seq_len": frames * settings.tokens_per_frame,
            "n_classes": len(procedural.FAMILIES), "classes": list(procedural.FAMILIES), "cond": "class",
            "tokenizer": settings.tokenizer,
        }  # fmt: skip
        self.model = self._build(parse_generator_config(raw)).train()
        self.data = loop.Clips(self._tokens, settings.seed, tokenizer.size, config.chunk_size)

    def _build(self, config: GeneratorConfig) -> Generator:
        model, rank = Generator(config, "tiny"), self.settings.factor_rank
        if rank is not None:
            features = fsq_features(self.tokenizer.config.levels, rank)
            model.tok_emb = FactoredEmbedding(features, config.width)
            model.head = FactoredHead(features, config.width)
        return model

    def _tokens(self, clips: torch.Tensor) -> list[torch.Tensor]:
        # [B, 3, frames, H, W] -> one flat int64 [T * k] a clip
        ids = self.tokenizer.encode_latents(self.tokenizer.codec.encode(clips))
        return [time_first(i[:, : self.settings.tokens_per_frame]) for i in ids]

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        settings = self.settings
        indices = torch.randint(settings.clips, (settings.batch,), generator=generator).tolist()
        dropped = (torch.rand(settings.batch, generator=generator) < settings.class_dropout).tolist()
        with torch.autocast("cpu", enabled=False):
            ids = self.data.batch(indices)
        classes = [procedural.label(settings.seed, i) for i in indices]
        conditions = [None if drop else c for drop, c in zip(dropped, classes, strict=True)]
        return F.cross_entropy(self.model.teacher_forced(ids, conditions).flatten(0, 1), ids.flatten())

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        averaged = self._build(self.model.config)
        averaged.load_state_dict(weights)
        if self.settings.factor_rank is None:
            averaged.save(path, torch.float16)
            return
        raw = averaged.config.raw | {"factor_rank": self.settings.factor_rank}
        write_tensors(path, compress(averaged.published()), raw, torch.float16)

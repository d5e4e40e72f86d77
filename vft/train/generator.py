"""``vft train generator``: trains a generator on the tokens of procedural video, of videos, or of ``.vft`` files.

Cross-entropy of the time-first ids of each clip given its class or caption, which is dropped now and then for the null
condition, so that guidance works. Tokens of encoded clips are kept. The token tables are linear in features of the
codes (vft/codebook.py), or whole.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from flexkernels.upload import upload

from ..checkpoint import write_tensors
from ..codebook import CodebookEmbedding, CodebookHead
from ..config import GeneratorConfig, parse_generator_config
from ..generator import Generator, time_first
from ..stills import join_ids, still_groups
from ..tokenizer import Tokenizer
from . import data, loop, lora, shards, start
from .loop import Engine, Settings

CONDITIONS = ("class", "text")
TABLES = ("fsq", "whole")


@dataclass(frozen=True)
class GeneratorSettings(Settings):
    """``tokens_per_frame`` registers of each latent frame are modelled; depth d means width 64 d. The defaults are
    those that the embedded generator began with.

    ``condition``: ``class``, or ``text`` for token files with captions and for ``named`` data. ``latent_frames``: the
    first ones of each token file are modelled (0: all). ``tables``: of tokens, ``fsq`` for ones that are linear in
    features of the codes, or ``whole``. ``force``: the checkpoint that is continued may be of another tokenizer, of as
    many ids, such as an earlier state of this one.
    """

    steps: int = 26000
    batch: int = 16
    clips: int = 80000
    learning_rate: float = 4e-3
    tokenizer: str = "tiny"
    depth: int = 4
    tokens_per_frame: int = 16
    class_dropout: float = 0.1
    tables: str = "fsq"
    condition: str = "class"
    latent_frames: int = 0
    force: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train generator`` beyond the common ones."""
    defaults = GeneratorSettings()
    loop.add_arguments(parser, defaults)
    parser.add_argument(
        "--tokenizer", default="", help=f"whose ids to model (default {defaults.tokenizer}, or what --from names)"
    )
    parser.add_argument(
        "--depth", type=int, default=defaults.depth, help="blocks and heads (default %(default)s; --from: its own)"
    )
    parser.add_argument(
        "-k", "--tokens-per-frame", type=int, default=defaults.tokens_per_frame,
        help="registers of each latent frame (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--class-dropout", type=float, default=defaults.class_dropout,
        help="how often the class or caption is dropped (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--condition", choices=CONDITIONS, default=defaults.condition,
        help="class: motion or subfolder; text: captions beside .vft files, or of named data (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--latent-frames", type=int, default=defaults.latent_frames,
        help="of each .vft file, the first ones (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--tables", choices=TABLES, default=defaults.tables,
        help="of tokens: linear in features of their codes, or whole (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="with --from: of another tokenizer than the checkpoint's, of as many ids"
    )


def run(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say; returns the exit code."""
    defaults = "" if args.start else GeneratorSettings.tokenizer
    settings = GeneratorSettings(
        **loop.common(args), tokenizer=args.tokenizer or defaults, depth=args.depth,
        tokens_per_frame=args.tokens_per_frame, class_dropout=args.class_dropout, tables=args.tables,
        condition=args.condition,
        latent_frames=args.latent_frames, force=args.force,
    )  # fmt: skip
    return loop.run(args, settings, train)


def train(
    folder: Path, settings: GeneratorSettings, *, minutes: float | None = None, engine: Engine | None = None
) -> None:
    """Trains or resumes the run in ``folder``; errors are those of :func:`vft.train.loop.train`."""
    loop.check(settings)
    if settings.depth < 1:
        raise ValueError(f"depth must be at least 1, got {settings.depth}")
    if not 0 <= settings.class_dropout <= 1:
        raise ValueError(f"class_dropout must lie between 0 and 1, got {settings.class_dropout}")
    if settings.tables not in TABLES:
        raise ValueError(f"tables must be one of {', '.join(TABLES)}, got {settings.tables!r}")
    if settings.condition not in CONDITIONS:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {settings.condition!r}")
    if settings.latent_frames < 0:
        raise ValueError(f"latent_frames must be at least 0, got {settings.latent_frames}")
    before = start.read_generator(settings.start) if settings.start else None
    tokenizer = Tokenizer.from_pretrained(_tokenizer(settings, before))
    if not 1 <= settings.tokens_per_frame <= tokenizer.registers:
        raise ValueError(f"tokens_per_frame must lie in 1..{tokenizer.registers}, got {settings.tokens_per_frame}")
    torch.manual_seed(settings.seed)
    loop.train(folder, settings, GeneratorTask(settings, tokenizer, before), minutes, engine)


def _tokenizer(settings: GeneratorSettings, before: start.Weights | None) -> str:
    """The reference of the tokenizer: as given, else what the checkpoint names, else the embedded one."""
    return settings.tokenizer or (before and before.config.get("tokenizer")) or GeneratorSettings.tokenizer


class GeneratorTask:
    """Next-token cross-entropy over the flat ids of clips, with class or caption dropout."""

    def __init__(self, settings: GeneratorSettings, tokenizer: Tokenizer, before: start.Weights | None = None) -> None:
        self.settings, self.tokenizer, self.start = settings, tokenizer, None
        self.data, frames = self._open_data()
        raw = {
            "depth": settings.depth, "vocab": tokenizer.config.codebook_size,
            "seq_len": frames * settings.tokens_per_frame, "tokenizer": _tokenizer(settings, before),
            "fingerprint": tokenizer.fingerprint, "frames": frames, "cond": settings.condition,
        }  # fmt: skip
        if settings.condition == "text":
            raw |= {"ctx_dim": self.data.captions([0])[0].shape[1], "n_ctx_null": 1}
        else:
            raw |= {"n_classes": len(self.data.classes), "classes": list(self.data.classes)}
        self.tables = settings.tables
        if before:
            raw = start.generator_config(before.config, raw, settings.force)
            self.tables = "fsq" if "fsq_levels" in before.config else "whole"
        self.model = self._build(parse_generator_config(raw)).train()
        if before:
            self.start = start.generator(self.model, settings.start, before)
            if settings.lora:
                lora.add(self.model, settings.lora, set(self.start.new))
        label = "--text CAPTION" if settings.condition == "text" else f"--class-name {self.data.classes[0]!r}"
        self.example = f"vft generate {label} --n 4 -o out.mp4 --model {{}}"

    def _open_data(self):
        """The data, and the most latent frames that a clip of it has."""
        settings, tokenizer = self.settings, self.tokenizer
        text = settings.condition == "text"
        folder = settings.data not in (data.PROCEDURAL, data.NAMED)
        if folder and data.holds_tokens(settings.data):
            wanted = tokenizer.name, settings.tokens_per_frame
            files = data.TokenFiles(settings.data, *wanted, text, fingerprint=tokenizer.fingerprint)
            return files, min(files.longest, settings.latent_frames or files.longest)
        if folder and not text and shards.holds_shards(settings.data):
            rows = shards.TokenShards(settings.data, tokenizer, settings.tokens_per_frame)
            return rows, min(rows.longest, settings.latent_frames or rows.longest)
        if (text and settings.data != data.NAMED) or settings.latent_frames:
            raise ValueError(
                "condition text and latent_frames need data to be a folder of .vft files (text: or 'named', "
                "latent_frames: or shards)"
            )
        config = tokenizer.config
        if tokenizer.size is None:
            raise ValueError(f"tokenizer {tokenizer.name!r} must have a working size")
        clips = data.clips(self._tokens, settings, config.chunk_size, tokenizer.size)
        return clips, tokenizer.codec.latent_shape(max(settings.frames or (config.chunk_size,)), 16, 16)[1]

    def _build(self, config: GeneratorConfig) -> Generator:
        model, levels = Generator(config, "tiny"), self.tokenizer.config.levels
        if self.tables == "fsq":
            model.tok_emb = CodebookEmbedding(levels, config.width)
            model.head = CodebookHead(levels, config.width)
        return model

    def _tokens(self, clips: torch.Tensor) -> list[torch.Tensor]:
        # [B, 3, frames, H, W] -> ids [T, N] of each clip
        tokenizer = self.tokenizer.to(self.model.device)
        ids = tokenizer.encode_latents(tokenizer.codec.to(tokenizer.device).encode(clips.to(tokenizer.device)))
        # one copy, for which the device is waited for once
        ids = torch.cat(ids).cpu().split([len(i) for i in ids])
        # as Tokenizer.encode has them: what stands still repeats its ids
        stride = tokenizer.codec.temporal_stride
        still = [still_groups(clip.transpose(0, 1), stride) for clip in clips]
        return [join_ids([i], [groups]) for i, groups in zip(ids, still, strict=True)]

    def recompute(self, on: bool) -> None:
        self.model.recompute = on

    def indices(self, generator: torch.Generator) -> list[int]:
        return torch.randint(self.settings.clips, (self.settings.batch,), generator=generator).tolist()

    def loss(self, generator: torch.Generator, part: slice = slice(None)) -> torch.Tensor:
        """The mean over clips of each one's mean cross-entropy, all clips in one packed pass."""
        settings, device = self.settings, self.model.device
        indices = self.indices(generator)[part]
        dropped = (torch.rand(settings.batch, generator=generator) < settings.class_dropout)[part].tolist()
        seeds = torch.randint(2**62, (settings.batch,), generator=generator)[part].tolist()
        with torch.autocast(device.type, enabled=False):
            clips = [ids[: settings.latent_frames or None] for ids in self.data.batch(indices)]
        flat = [time_first(ids[:, : settings.tokens_per_frame]) for ids in clips]
        inputs = [self._corrupted(ids[:-1], seed) for ids, seed in zip(flat, seeds, strict=True)]
        ids, *inputs = upload([torch.cat(flat), *inputs], device)
        conditions = [None if drop else c for drop, c in zip(dropped, self._conditions(indices), strict=True)]
        x = self.model.packed(inputs, self.model.starts(conditions), self.model.cross(conditions))
        each = self._cross_entropy(x, ids)
        return torch.stack([loss.mean() for loss in each.split([len(ids) for ids in flat])]).mean()

    def _cross_entropy(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        head = self.model.head
        if self.tables == "fsq":
            return head.cross_entropy(x, ids)
        return F.cross_entropy(head(x).float(), ids, reduction="none")

    def _conditions(self, indices: list[int]) -> list:
        if self.settings.condition == "text":
            return [emb.to(self.model.device) for emb in self.data.captions(indices)]
        return [self.data.label(i) for i in indices]

    def _corrupted(self, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Random ids in place of a share of those that the model reads."""
        if self.settings.corruption == 0:
            return ids
        generator = torch.Generator().manual_seed(seed)
        hit = torch.rand(ids.shape, generator=generator) < self.settings.corruption
        return torch.where(hit, torch.randint(self.model.config.vocab, ids.shape, generator=generator), ids)

    def save(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        averaged = self._build(self.model.config)
        averaged.load_state_dict(lora.merged(weights))
        raw = averaged.config.raw
        if self.tables == "fsq":
            raw = raw | {"fsq_levels": list(self.tokenizer.config.levels)}
        write_tensors(path, averaged.published(), raw, torch.float16)

"""``vft train budget``: fits the predictor of ``vft encode --psnr`` and ``--tokens`` for a tokenizer.

It looks at clips decoded from 1, 2, 3, 4, 6, 8, ..., N registers, and learns to tell their errors from the encoder's
input and output, see :class:`vft.budget.Predictor`. Takes minutes, not hours; nothing is resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import progress
from ..budget import Predictor, decoded_errors, features
from ..files import check_output
from ..tokenizer import Tokenizer
from . import data
from .loop import Settings

# as many as `decoded_errors` takes at once
BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft train budget``."""
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="file of the predictor, .safetensors, replaced if it exists")
    add("--model", default="tiny", help="tokenizer that it is for (default %(default)s)")
    add("--data", default=data.PROCEDURAL, help="'procedural' or a folder of videos (default %(default)s)")
    add("--clips", type=int, default=512, help="to learn from (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Fits and saves; prints the error on clips that were left out."""
    check_output(args.output, [args.model])
    tokenizer = Tokenizer.from_pretrained(args.model, device=args.device)
    x, y = examples(tokenizer, args.data, args.clips, args.seed)
    # a fifth tells how good it is, then all are used
    held = len(x) // 5
    error = (Predictor.fit(x[held:], y[held:], "")(x[:held]) / y[:held]).log10().mul(10).square().mean().sqrt()
    Predictor.fit(x, y, tokenizer.fingerprint).save(args.output)
    print(f"{args.output}: predicts PSNR to {error:.2f} dB (root mean square of {held} clips left out)")
    print(f"Next: vft encode VIDEO -o out.vft --psnr 24 --model {args.model} --predictor {args.output}")


def examples(tokenizer: Tokenizer, source: str, clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[clips, n]`` and errors ``[clips, probes]`` of clips of a run's data with that seed."""
    if tokenizer.size is None:
        raise ValueError(f"model {tokenizer.name!r} must have a working size")
    settings = Settings(data=source, clips=clips, seed=seed)
    made = data.clips(lambda pixels: pixels, settings, tokenizer.config.chunk_size, tokenizer.size)
    x, y = [], []
    for first in progress.bar(range(0, clips, BATCH), desc="clips", unit="batch"):
        chunks = [clip.transpose(0, 1) for clip in made.batch(range(first, min(first + BATCH, clips)))]
        ids = tokenizer.encode_chunks(chunks)
        y.append(decoded_errors(tokenizer, chunks, ids))
        levels = tokenizer.config.levels
        x += [features(chunk, i, levels, tokenizer.size) for chunk, i in zip(chunks, ids, strict=True)]
    return torch.stack(x), torch.cat(y)

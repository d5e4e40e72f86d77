"""``vft train``: trains a tokenizer, a generator, or what helps a tokenizer."""

from __future__ import annotations

import argparse
import importlib

from . import options

HELP = "Train a tokenizer, a refiner of its frames, a generator or a predictor of budgets."
KINDS = ("tokenizer", "generator", "refiner", "budget")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each kind of training has its own arguments and defaults, so the words after the command say whose are added."""
    options.add_seed(parser)
    parser.add_argument("kind", nargs="?", choices=KINDS, default=KINDS[0], help="what to train (default: tokenizer)")
    kind = next((word for word in parser.get_default("words") if word in KINDS), KINDS[0])
    trainer = importlib.import_module(f"vft.train.{kind}")
    trainer.add_arguments(parser)
    parser.set_defaults(trainer=trainer)


def run(args: argparse.Namespace) -> int:
    return args.trainer.run(args)

"""``vft demo``: the shipped clip, reconstructed from more and more of its tokens."""

from __future__ import annotations

import argparse

from . import options

HELP = "Reconstruct the shipped clip from more and more tokens."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    parser.add_argument(
        "-o", "--output", help="folder for demo.mp4, demo.png and demo.html, replaced there (default: here)"
    )


def run(args: argparse.Namespace) -> None:
    from vft import demo
    from vft.files import check_folder, check_new

    if args.output is None:
        for name in demo.FILES:
            check_new(name, "give a folder with -o (-o . replaces it)")
    else:
        check_folder(args.output)
    demo.run(options.load_tokenizer(args), args.output or ".", **options.sampler(args))

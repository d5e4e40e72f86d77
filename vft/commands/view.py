"""``vft view``: .vft files or videos as one HTML page with a slider over the tokens kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

HELP = "Make a page, one HTML file, that shows what tokens hold."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    parser.add_argument("inputs", nargs="+", help=".vft files, or videos, which are encoded first")
    parser.add_argument(
        "-o", "--output", help="HTML file, replaced if it exists (default: INPUT.html, if there is none)"
    )
    parser.add_argument("--source", help="the video that the one .vft file was made of, to be shown beside it")
    parser.add_argument(
        "--maps", type=options.at_least(0), default=32, help="registers drawn by themselves (default: 32)"
    )


def run(args: argparse.Namespace) -> None:
    from vft import view
    from vft.files import check_new, check_output

    inputs = [*args.inputs, args.source, args.model]
    if args.source is not None and len(args.inputs) > 1:
        raise ValueError(f"source must go with one input, got {len(args.inputs)}")
    if args.output is None:
        output = check_new(f"{args.inputs[0]}.html", "-o replaces it")
    elif Path(args.output).suffix != ".html":
        raise ValueError(f"output {args.output!r} must end in .html")
    else:
        output = check_output(args.output, inputs)
    tokenizer = options.load_tokenizer(args)
    settings = {"maps": args.maps, **options.sampler(args)}
    clips = [view.of_file(tokenizer, path, args.source, **settings) for path in args.inputs]
    view.write(output, clips, clips[0]["name"])
    print(f"{output}: {len(clips)} clips, {output.stat().st_size} bytes; open it in a browser")

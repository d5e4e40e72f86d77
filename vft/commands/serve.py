"""``vft serve``: the page of ``vft view`` for videos that a browser on this machine uploads."""

from __future__ import annotations

import argparse

from . import options

HELP = "Serve a page on this machine that encodes the videos dropped on it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    parser.add_argument("--port", type=options.at_least(0), default=8080, help="0: any free one (default: 8080)")
    parser.add_argument("--megabytes", type=options.at_least(1), default=64, help="largest upload (default: 64)")


def run(args: argparse.Namespace) -> None:
    from vft.serve import Server

    tokenizer = options.load_tokenizer(args)
    with Server(tokenizer, args.port, args.megabytes << 20, **options.sampler(args)) as server:
        print(f"http://127.0.0.1:{server.server_port} (control-C ends it)", flush=True)
        server.serve_forever()

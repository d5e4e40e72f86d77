"""``vft decode``: a .vft file, or the beginning of one, to a video file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vft import reading

from . import options

if TYPE_CHECKING:
    import torch

HELP = "Turn a .vft file, whole or cut, into a video."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_memory(parser)
    options.add_sampler(parser)
    options.add_video_output(parser)
    options.add_dtype(parser)
    parser.add_argument("--fp8", action="store_true", help="keep the decoder's matrices as fp8 (docs/tokenizer.md)")
    parser.add_argument("--force", action="store_true", help="decode the tokens of another model, too")
    parser.add_argument("input", help=".vft file; -: standard input")
    reading.add_audio(parser, "the track that encode --audio copy kept goes into the video")


def run(args: argparse.Namespace) -> None:
    from vft.tokens import VideoTokens
    from vft.video import output_rate, write_video
    from vft.video.audio import sidecar

    options.check_video_output(args.output, args.input, args.model)
    if args.input == "-":
        tokens = VideoTokens.from_bytes(sys.stdin.buffer.read(), "standard input")
    else:
        tokens = VideoTokens.load(args.input)
    options.check_keep(args.keep, tokens.registers)
    if args.model is None and tokens.model != options.DEFAULT_MODEL:
        raise ValueError(f"{args.input} was made by the model {tokens.model!r}: name it with --model")
    tokenizer = options.load_tokenizer(args, dtype=args.dtype, weights="fp8" if args.fp8 else None)
    shown = resized(pieces(tokenizer, tokens, args, force=args.force), args.size)
    track = sidecar(args.input) if args.audio == "copy" else None
    count = write_video(args.output, shown, tokens.fps, args.quality, track)
    rate = output_rate(args.output, tokens.fps)
    print(f"{args.output}: {count} frames, {rate:g} fps, from {args.keep or tokens.registers} registers a frame")


def pieces(tokenizer, tokens, args: argparse.Namespace, **more) -> Iterator[torch.Tensor]:
    """Decoded uint8 pieces [t, H, W, 3], with a progress bar over the solver's steps on a terminal."""
    from vft.progress import bar as progress_bar
    from vft.video import to_uint8

    with progress_bar(desc="decode", unit="step") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        settings = options.sampler(args) | more
        for piece in tokenizer.decode_stream(tokens, keep=args.keep, progress=progress, **settings):
            yield to_uint8(piece).cpu()


def resized(frames, size: int | None) -> Iterator[torch.Tensor]:
    from vft.video import resize

    for piece in frames:
        yield piece if size is None else resize(piece, size, size)

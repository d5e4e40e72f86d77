"""``vft reconstruct``: a video file through the tokens and back, with sizes and PSNR."""

from __future__ import annotations

import argparse
import math
import os

from . import options
from .decode import pieces, resized

HELP = "Encode and decode a video; print PSNR."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    options.add_video_output(parser)
    parser.add_argument("input", help="video file")


def run(args: argparse.Namespace) -> None:
    import torch

    from vft import video
    from vft.metrics import frames_psnr

    options.check_video_output(args.output, args.input, args.model)
    tokenizer = options.load_tokenizer(args)
    options.check_keep(args.keep, tokenizer.registers)
    clip = video.read_video(args.input, tokenizer.size)
    source = video.to_uint8(video.preprocess(clip.frames, tokenizer.size))
    tokens = tokenizer.encode(clip).truncate(args.keep or tokenizer.registers)
    decoded = list(pieces(tokenizer, tokens, args))
    quality = frames_psnr(torch.cat(decoded), source)
    video.write_video(args.output, resized(decoded, args.size), tokens.fps, args.quality)
    bits = 8 * tokens.nbytes / math.prod(source.shape[:3])
    print(f"source: {os.path.getsize(args.input)} bytes, {tokens.frames} frames, {tokens.width}x{tokens.height}")
    print(f"tokens: {options.describe(tokens)}, {tokens.nbytes} bytes, {bits:.4f} bits per pixel")
    print(f"PSNR: {quality:.2f} dB at {source.shape[2]}x{source.shape[1]}, where the model works")

"""``vft bench``: times encoding, decoding or generating with a model on this machine, and profiles it."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

HELP = "Time encoding, decoding or generating; profile it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    add, positive = parser.add_argument, options.at_least(1)
    add("what", choices=("encode", "decode", "generate"), help="random frames or ids serve as input")
    add("--batch", type=positive, default=1, help="samples in one call (default: 1)")
    add("--frames", type=positive, default=5, help="latent frames (default: 5, 17 frames)")
    add("-k", "--keep", type=positive, help="registers, or tokens, of every latent frame")
    add("--size", type=options.at_least(16), help="side of the frames, where the model takes any size")
    options.add_dtype(parser)
    options.add_weights(parser, "generate: ")
    add("--temperature", type=float, default=1.0, help="generate: of the tokens (default: 1)")
    add("--token-guidance", type=float, help="generate: guidance scale (default: off)")
    add("--seconds", type=float, default=2.0, help="how long it is timed (default: 2)")
    add("--profile", action="store_true", help="print the time of each op and its share of the bound")
    add("--trace", type=Path, help="with --profile: Chrome trace to write, .json")
    add("--top", type=positive, default=15, help="with --profile: ops shown (default: 15)")


def run(args: argparse.Namespace) -> None:
    from vft import bench
    from vft.files import check_output

    if args.trace is not None:
        if not args.profile or args.trace.suffix != ".json":
            raise ValueError("--trace takes a .json file and needs --profile")
        check_output(args.trace)
    common = {"batch": args.batch, "frames": args.frames}
    if args.what == "generate":
        generator = options.load_generator(args)
        sampling = {"temperature": args.temperature, "guidance": args.token_guidance, "seed": args.seed}
        job = bench.generate_job(generator, keep=args.keep, **common, **sampling)
    else:
        tokenizer = options.load_tokenizer(args, dtype=args.dtype)
        options.check_keep(args.keep, tokenizer.registers)
        common["size"] = args.size
        if args.what == "encode":
            job = bench.encode_job(tokenizer, seed=args.seed, **common)
        else:
            job = bench.decode_job(tokenizer, keep=args.keep, **common, **options.sampler(args))
    bench.run(job, args.dtype, args.seconds, args.profile, args.trace, args.top)

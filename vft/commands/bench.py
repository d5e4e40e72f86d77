"""``vft bench``: times encoding, decoding, generating or a training step on this machine, and profiles it."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

HELP = "Time encoding, decoding, generating or a training step; profile it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    add, positive = parser.add_argument, options.at_least(1)
    add("what", choices=("encode", "decode", "generate", "train"), help="random frames or ids serve as input")
    add("--random", metavar="SIZE", help="encode, decode: random weights, 'published' or a config.json for their size")
    add("--batch", type=positive, default=1, help="samples in one call (default: 1)")
    add("--frames", type=positive, default=5, help="latent frames (default: 5, 17 frames)")
    add("-k", "--keep", type=positive, help="registers, or tokens, of every latent frame")
    add("--size", type=options.at_least(16), help="side of the frames, where the model takes any size")
    options.add_dtype(parser)
    options.add_weights(parser, int8="generate: ", fp8="decode, generate: ")
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
    if args.random is not None and (args.model is not None or args.what not in ("encode", "decode")):
        raise ValueError("--random takes the place of --model, in bench encode and decode")
    if args.model is not None and args.what == "train":
        raise ValueError("bench train times the training of a new tokenizer: leave out --model")
    if (args.fp8 and args.what not in ("decode", "generate")) or (args.int8 and args.what != "generate"):
        raise ValueError(f"bench {args.what} has no such weights: leave out --int8 and --fp8")
    common = {"batch": args.batch, "frames": args.frames}
    if args.what == "generate":
        generator = options.load_generator(args)
        sampling = {"temperature": args.temperature, "guidance": args.token_guidance, "seed": args.seed}
        job = bench.generate_job(generator, keep=args.keep, **common, **sampling)
    elif args.what == "train":
        bf16 = args.dtype == "bfloat16"
        job = bench.train_job(batch=args.batch, device=options.device(args), bf16=bf16, seed=args.seed)
    else:
        tokenizer = _tokenizer(args)
        options.check_keep(args.keep, tokenizer.registers)
        common["size"] = args.size
        if args.what == "encode":
            job = bench.encode_job(tokenizer, seed=args.seed, **common)
        else:
            job = bench.decode_job(tokenizer, keep=args.keep, **common, **options.sampler(args))
    bench.run(job, args.dtype, args.seconds, args.profile, args.trace, args.top)


def _tokenizer(args: argparse.Namespace):
    import torch

    from vft import bench

    if args.random is None:
        return options.load_tokenizer(args, dtype=args.dtype, weights="fp8" if args.fp8 else None)
    config = None if args.random == "published" else Path(args.random)
    tokenizer = bench.random_tokenizer(config, options.device(args), getattr(torch, args.dtype), args.seed)
    return tokenizer.quantize() if args.fp8 else tokenizer

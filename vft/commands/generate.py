"""``vft generate``: a class or a caption to videos, or to .vft files."""

from __future__ import annotations

import argparse
import os

from . import options

HELP = "Generate videos of a class or a caption."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_sampler(parser)
    options.add_video_output(parser)
    condition = parser.add_mutually_exclusive_group()
    condition.add_argument("--class-name", help="name or index of the class, for a class-conditional generator")
    condition.add_argument("--text-emb", help="safetensors file with text_emb [n, c, d] and text_mask [n, c]")
    condition.add_argument(
        "--text",
        help="caption, embedded as the generator was trained (umT5: needs the text extra); without --model such as "
        "'red disc moving left'",
    )
    add, positive = parser.add_argument, options.at_least(1)
    add("--text-encoder", help="words, or folder or hub id of an umT5 encoder (default: by its width)")
    add("--tokenizer", help="model that decodes (default: the one the generator names)")
    add("--n", type=positive, help="videos (default: one, or one a caption)")
    add("--frames", type=positive, default=5, help="latent frames (default: 5, 17 frames)")
    add("--fps", type=float, default=8.0, help="frames a second of the videos (default: 8)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    add("--top-k", type=int, help="draw from the K likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    add("--min-p", type=float, help="leave out tokens below this share of the likeliest one")
    add("--token-guidance", type=float, help="guidance scale of the tokens (default: off)")
    options.add_dtype(parser)
    options.add_weights(parser)
    add(
        "--cuda-graph", action=argparse.BooleanOptionalAction,
        help="replay the steps of generation as CUDA graphs (default: on a GPU)",
    )  # fmt: skip
    add("--sheet", metavar="PNG", help="picture of frames, replaced if it exists (default: NAME.png, if there is none)")
    add("--tokens-only", action="store_true", help="write .vft files (NAME-0.vft, ... for several)")


def run(args: argparse.Namespace) -> None:
    from vft import generation

    if args.model is None and (args.text is not None or args.text_emb is not None):
        args.model = options.TEXT_MODEL
    inputs = [args.text_emb, args.model, args.tokenizer]
    if not args.tokens_only:
        options.check_video_output(args.output, *inputs)
        sheet = generation.sheet_path(args.output, args.sheet, inputs)
    generator = options.load_generator(args)
    condition = _condition(generator, args)
    count = args.n or len(condition.get("text_emb", [None]))
    outputs = generation.token_paths(args.output, count, inputs) if args.tokens_only else []
    reference = args.tokenizer or generator.tokenizer
    if reference is None:
        raise ValueError("the generator names no tokenizer: give one with --tokenizer")
    tokenizer = options.load_tokenizer(args, reference)
    samples = generation.tokens(
        generator, tokenizer, **condition, n=count, frames=args.frames, tokens_per_frame=args.keep,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        guidance=args.token_guidance, seed=args.seed, cuda_graph=args.cuda_graph, fps=args.fps, size=args.size,
    )  # fmt: skip
    if args.tokens_only:
        for path, tokens in zip(outputs, samples, strict=True):
            tokens.save(path)
            print(f"{path}: {options.describe(tokens)}, {os.path.getsize(path)} bytes")
        return
    names = generation.names(condition, generator.classes, count, args.text)
    generation.show(tokenizer, samples, args.output, sheet, args.quality, names, **options.sampler(args))
    each = f"{samples[0].frames} frames, {options.describe(samples[0])} each"
    print(f"{args.output} and {sheet}: {count} videos of {each}")


def _condition(generator, args: argparse.Namespace) -> dict:
    """What ``--class-name``, ``--text-emb`` or ``--text`` give, as the generator's arguments."""
    if args.class_name is not None:
        name = args.class_name
        known = name in generator.classes or not name.isdecimal()
        return {"class_id": name if known else int(name)}
    if args.text_emb is None and args.text is None:
        return {}
    if generator.config.cond != "text":
        raise ValueError("this generator is conditioned on classes: give --class-name, not a text")
    from vft import text

    if args.text_emb is not None:
        emb, mask = text.load_embeddings(args.text_emb)
    else:
        width = generator.config.ctx_dim
        encoder = args.text_encoder or text.ENCODERS.get(width)
        if encoder is None:
            raise ValueError(f"no text encoder has {width} channels: name one with --text-encoder, or give --text-emb")
        emb, mask = text.encode_captions([args.text], encoder, device=generator.device)
    return {"text_emb": emb, "text_mask": mask}

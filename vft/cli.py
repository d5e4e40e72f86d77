"""The ``vft`` command: encode, decode, reconstruct, generate, demo, info, eval, train, bench.

Bad input ends with exit code 2 and one line on stderr; outputs appear complete or not at all. A folder of which some
videos failed ends with exit code 1.
"""

import argparse
import contextlib
import importlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import flexkernels
from flexkernels.library import BACKENDS
from vft import batch, bench, checkpoint, demo, evaluate, video
from vft.files import check_output
from vft.solver import SOLVERS
from vft.tokens import MAGIC, VideoTokens
from vft.video import audio
from vft.video.options import add_audio_option, add_read_options, print_left_out, shown_warnings

DEFAULT_MODEL = "tiny"
_TOKENS_SUFFIX = ".vft"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vft: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own arguments) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        backend = flexkernels.backend(args.backend) if args.backend else contextlib.nullcontext()
        with _terminable(), backend, shown_warnings():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("vft: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        return 143
    except BrokenPipeError:
        # the reader of our output has gone; keep Python from writing to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"vft: error: {_one_line(error)}", file=sys.stderr)
        return 2


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that unfinished files are removed."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def stop(*_):
        raise _Terminated

    # only the main thread may set a signal
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def encode(args: argparse.Namespace) -> int | None:
    """``vft encode``: a video file to a .vft file, or a folder of them to a folder; 1 where a video of it failed."""
    if args.batch:
        return _encode_folder(args)
    if os.path.isdir(args.input):
        raise ValueError(f"{args.input} is a folder: add --batch to encode every video in it")
    check_output(args.output)
    tokenizer = load_tokenizer(args)
    _check_keep(args.keep, tokenizer.registers)
    tokens = tokenizer.encode(args.input, fps=args.fps, strict=args.strict)
    if args.keep is not None:
        tokens = tokens.truncate(args.keep)
    tokens.save(args.output)
    _carry_audio(args)
    print(f"{args.output}: {_describe(tokens)}, {os.path.getsize(args.output)} bytes")


def _carry_audio(args: argparse.Namespace) -> None:
    if args.audio == "copy":
        audio.save_audio(args.input, args.output)
    elif video.probe_video(args.input).audio:
        print(f"vft: warning: {args.input}: its audio is left out (--audio copy keeps it)", file=sys.stderr)


def _encode_folder(args: argparse.Namespace) -> int:
    rank, world_size = batch.shard()
    local_rank = os.environ.get("LOCAL_RANK")
    if args.device in (None, "cuda") and local_rank is not None and torch.cuda.is_available():
        args.device = f"cuda:{local_rank}"
    tokenizer = load_tokenizer(args)
    _check_keep(args.keep, tokenizer.registers)
    hidden = not sys.stderr.isatty()
    with tqdm(desc=f"encode {rank + 1}/{world_size}", unit="video", position=rank, leave=False, disable=hidden) as bar:

        def progress(done: int, total: int, line: dict | None) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if line and "error" in line:
                tqdm.write(f"vft: error: {line['file']}: {line['error']}", sys.stderr)
            for warning in line.get("warnings", ()) if line else ():
                tqdm.write(f"vft: warning: {line['file']}: {warning}", sys.stderr)

        summary = batch.encode_folder(
            tokenizer, args.input, args.output, keep=args.keep, packed=args.packed, readers=args.readers,
            rank=rank, world_size=world_size, fps=args.fps, strict=args.strict, audio=args.audio == "copy",
            checksum=args.checksum, progress=progress,
        )  # fmt: skip
    if rank == 0:
        print_left_out(summary.left_out)
    if summary.silent:
        print(
            f"vft: warning: the audio of {summary.silent} videos is left out (--audio copy keeps it)", file=sys.stderr
        )
    counts = f"{summary.encoded} encoded, {summary.skipped} there already, {summary.failed} failed"
    print(f"{args.output}: {counts}" + (f", {len(summary.left_out)} left out" if summary.left_out else ""))
    return 1 if summary.failed else 0


def decode(args: argparse.Namespace) -> None:
    """``vft decode``: a .vft file, or the beginning of one, to a video file."""
    _check_video_output(args.output)
    tokens = VideoTokens.load(args.input)
    _check_keep(args.keep, tokens.registers)
    if args.model is None and tokens.model != DEFAULT_MODEL:
        raise ValueError(f"{args.input} was made by the model {tokens.model!r}: name it with --model")
    tokenizer = load_tokenizer(args)
    track = audio.sidecar(args.input) if args.audio == "copy" else None
    count = video.write_video(args.output, _decoded(tokenizer, tokens, args), tokens.fps, args.quality, track)
    rate = video.output_rate(args.output, tokens.fps)
    print(f"{args.output}: {count} frames, {rate:g} fps, from {args.keep or tokens.registers} registers a frame")


def reconstruct(args: argparse.Namespace) -> None:
    """``vft reconstruct``: a video file through the tokens and back, with sizes and PSNR."""
    _check_video_output(args.output)
    tokenizer = load_tokenizer(args)
    _check_keep(args.keep, tokenizer.registers)
    clip = video.read_video(args.input, tokenizer.size)
    source = video.to_uint8(video.preprocess(clip.frames, tokenizer.size))
    tokens = tokenizer.encode(clip).truncate(args.keep or tokenizer.registers)
    pieces = list(_decoded(tokenizer, tokens, args, resize=False))
    quality = video.psnr(torch.cat(pieces), source)
    video.write_video(args.output, _resized(pieces, args.size), tokens.fps, args.quality)
    pixels = math.prod(source.shape[:3])
    print(f"source: {os.path.getsize(args.input)} bytes, {tokens.frames} frames, {tokens.width}x{tokens.height}")
    print(f"tokens: {_describe(tokens)}, {tokens.nbytes} bytes, {8 * tokens.nbytes / pixels:.4f} bits per pixel")
    print(f"PSNR: {quality:.2f} dB at {source.shape[2]}x{source.shape[1]}, where the model works")


def generate(args: argparse.Namespace) -> None:
    """``vft generate``: a class or a caption to videos, or with ``--tokens-only`` to .vft files."""
    from vft import generation

    if not args.tokens_only:
        _check_video_output(args.output)
    generator = _load_generator(args, getattr(torch, args.dtype))
    condition = _condition(generator, args)
    count = args.n or len(condition.get("text_emb", [None]))
    outputs = generation.output_paths(args.output, count, args.tokens_only)
    reference = args.tokenizer or generator.tokenizer
    if reference is None:
        raise ValueError("the generator names no tokenizer: give one with --tokenizer")
    tokenizer = load_tokenizer(args, reference)
    samples = generation.tokens(
        generator, tokenizer, condition, n=count, frames=args.frames, tokens_per_frame=args.keep,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        guidance=args.token_guidance, seed=args.seed, fps=args.fps, size=args.size,
    )  # fmt: skip
    if args.tokens_only:
        for path, tokens in zip(outputs, samples, strict=True):
            tokens.save(path)
            print(f"{path}: {_describe(tokens)}, {os.path.getsize(path)} bytes")
        return
    generation.show(tokenizer, samples, args.output, args.quality, **_sampler(args))
    each = f"{samples[0].frames} frames, {_describe(samples[0])} each"
    print(f"{args.output} and {outputs[0]}: {count} videos of {each}")


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
            raise ValueError(f"no umT5 encoder has {width} channels: name one with --text-encoder, or give --text-emb")
        emb, mask = text.encode_captions([args.text], encoder, device=generator.device)
    return {"text_emb": emb, "text_mask": mask}


def run_demo(args: argparse.Namespace) -> None:
    """``vft demo``."""
    demo.run(load_tokenizer(args), args.output, **_sampler(args))


def run_eval(args: argparse.Namespace) -> None:
    """``vft eval``: rate and distortion, control and class accuracy, as a table, JSON and a picture."""
    evaluate.run(args, load_tokenizer(args))


def info(args: argparse.Namespace) -> None:
    """``vft info``: facts about a .vft file, a video file or a model; without an argument, about the installation."""
    if args.target is None:
        from flexkernels import info as installation

        installation.main([])
        return
    facts = _facts(args)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _facts(args: argparse.Namespace) -> dict:
    target = args.target
    if os.path.isdir(target) or target.endswith(".safetensors") or not (os.path.exists(target) or _names_file(target)):
        args.model = target
        if "cond" in checkpoint.read(target)[0]:
            return _generator_facts(target)
        tokenizer = load_tokenizer(args)
        parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
        size = f"{tokenizer.size}x{tokenizer.size}" if tokenizer.size else "any multiple of 16"
        levels = ",".join(map(str, tokenizer.config.levels))
        return {
            "kind": "model", "name": tokenizer.name, "parameters": parameters, "frame size": size,
            "registers": tokenizer.registers, "codebook": f"{math.prod(tokenizer.config.levels)} ids, levels {levels}",
        }  # fmt: skip
    if _is_tokens(target):
        tokens = VideoTokens.load(target)
        return {
            "kind": "tokens", "model": tokens.model, "tokens": _describe(tokens), "frames": tokens.frames,
            "fps": f"{tokens.fps:g}", "source size": f"{tokens.width}x{tokens.height}",
            "codebook": f"{tokens.codebook_size} ids, levels {','.join(map(str, tokens.levels))}",
            "bytes": os.path.getsize(target),
        }  # fmt: skip
    probe = video.probe_video(target)
    return {
        "kind": "video", "container": probe.container, "codec": probe.codec, "size": f"{probe.width}x{probe.height}",
        "frames": probe.frames or "not stated", "fps": f"{probe.fps:g}", "audio": probe.audio or "none",
        "bytes": os.path.getsize(target),
    }  # fmt: skip


def _generator_facts(target: str) -> dict:
    from vft import Generator

    model = Generator.from_pretrained(target)
    config = model.config
    condition = f"{config.n_classes} classes" if config.cond == "class" else f"text, {config.ctx_dim} channels"
    return {
        "kind": "generator", "name": model.name, "parameters": sum(p.numel() for p in model.parameters()),
        "depth": config.depth, "condition": condition, "longest": f"{config.seq_len} tokens",
        "codebook": f"{config.vocab} ids", "tokenizer": config.tokenizer or "not stated",
    }  # fmt: skip


def run_bench(args: argparse.Namespace) -> None:
    """``vft bench``: times encoding, decoding or generating, and profiles it."""
    if args.trace is not None:
        if not args.profile or args.trace.suffix != ".json":
            raise ValueError("--trace takes a .json file and needs --profile")
        check_output(args.trace)
    dtype = getattr(torch, args.dtype)
    common = {"batch": args.batch, "frames": args.frames}
    if args.what == "generate":
        generator = _load_generator(args, dtype)
        options = {"temperature": args.temperature, "guidance": args.token_guidance, "seed": args.seed}
        job = bench.generate_job(generator, keep=args.keep, **common, **options)
    else:
        tokenizer = load_tokenizer(args, dtype=dtype)
        _check_keep(args.keep, tokenizer.registers)
        common["size"] = args.size
        if args.what == "encode":
            job = bench.encode_job(tokenizer, seed=args.seed, **common)
        else:
            job = bench.decode_job(tokenizer, keep=args.keep, **common, **_sampler(args))
    bench.run(job, args.dtype, args.seconds, args.profile, args.trace, args.top)


def _names_file(target: str) -> bool:
    return target.endswith((_TOKENS_SUFFIX, *video.OUTPUT_FORMATS))


def _is_tokens(path: str) -> bool:
    if path.endswith(_TOKENS_SUFFIX):
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def load_tokenizer(args: argparse.Namespace, reference: str | None = None, dtype: torch.dtype = torch.float32):
    """The tokenizer that ``reference``, else ``--model``, and ``--device`` ask for."""
    from vft import Tokenizer

    return Tokenizer.from_pretrained(reference or args.model or DEFAULT_MODEL, device=_device(args), dtype=dtype)


def _load_generator(args: argparse.Namespace, dtype: torch.dtype):
    from vft import Generator

    weights = "int8" if args.int8 else None
    return Generator.from_pretrained(args.model or DEFAULT_MODEL, device=_device(args), dtype=dtype, weights=weights)


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available on this machine")
    return device


def _decoded(tokenizer, tokens: VideoTokens, args: argparse.Namespace, resize: bool = True) -> Iterator[torch.Tensor]:
    """Decoded uint8 pieces [t, H, W, 3], with a progress bar over the solver's steps on a terminal."""
    with tqdm(desc="decode", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        for piece in tokenizer.decode_stream(tokens, keep=args.keep, progress=progress, **_sampler(args)):
            yield from _resized([video.to_uint8(piece).cpu()], args.size if resize else None)


def _resized(pieces, size: int | None) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece if size is None else video.resize(piece, size, size)


def _sampler(args: argparse.Namespace) -> dict:
    """The sampler's options that were given; the others are left to the model."""
    options = {"seed": args.seed, "solver": args.solver}
    if args.steps is not None:
        options["steps"] = args.steps
    if args.guidance is not None:
        options["guidance"] = _guidance(args.guidance)
    return options


def _guidance(text: str):
    kind, _, scale = text.partition(":")
    try:
        if kind == "none" and not scale:
            return None
        if kind == "cfg":
            return flexkernels.CFG(float(scale))
        if kind == "apg":
            return flexkernels.APG(scale=float(scale)) if scale else flexkernels.APG()
    except ValueError as error:
        raise ValueError(f"guidance {text!r}: {error}") from error
    raise ValueError(f"guidance must be none, cfg:SCALE, apg or apg:SCALE, got {text!r}")


def _check_keep(keep: int | None, registers: int) -> None:
    if keep is not None and keep > registers:
        raise ValueError(f"keep must be between 1 and {registers}, got {keep}")


def _check_video_output(path: str) -> None:
    video.output_format(path)
    check_output(path)


def _describe(tokens: VideoTokens) -> str:
    return f"{tokens.latent_frames} x {tokens.registers} = {tokens.ids.numel()} tokens"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _at_least(smallest: int):
    def integer(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    return integer


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="vft", description="Tokenize video, and make video from tokens.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vft {flexkernels.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    base, model, sampler, output = _base(), _model_options(), _sampler_options(), _output_options()

    def add(name: str, run, help: str, *parents) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, parents=[*parents, base], allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    command = add("encode", encode, "Turn a video into a .vft file of tokens, or a folder of videos into many.", model)
    command.add_argument("input", help="video file of any size, rate and length, or a folder")
    command.add_argument("-o", "--output", "--out", required=True, help=".vft file, replaced if it exists; a folder")
    command.add_argument("-k", "--keep", type=_at_least(1), help="keep the first K registers of every latent frame")
    command.add_argument("--batch", action="store_true", help="input and output are folders; finished videos are kept")
    command.add_argument("--packed", type=_at_least(1), default=8, help="with --batch: chunks in one call (default: 8)")
    command.add_argument("--readers", type=_at_least(1), default=2, help="with --batch: reading threads (default: 2)")
    add_read_options(command)
    command = add("decode", decode, "Turn a .vft file, whole or cut, into a video.", model, sampler, output)
    command.add_argument("input", help=".vft file")
    add_audio_option(command, "the track that encode --audio copy kept goes into the video")
    command = add("reconstruct", reconstruct, "Encode and decode a video; print PSNR.", model, sampler, output)
    command.add_argument("input", help="video file")
    command = add("generate", generate, "Generate videos of a class or a caption.", model, sampler, output)
    _add_generator_options(command)
    command = add("demo", run_demo, "Reconstruct the shipped clip from more and more tokens.", model, sampler)
    command.add_argument("-o", "--output", default=".", help="folder for demo.mp4 and demo.png (default: here)")
    command = add("eval", run_eval, "Measure what a model's tokens are worth; optionally a generator too.", model)
    evaluate.add_arguments(command)
    command = add("bench", run_bench, "Time encoding, decoding or generating; profile it.", model, sampler)
    _add_bench_options(command)
    command = add("info", info, "Print facts about a .vft file, a video, a model, or the installation.")
    command.add_argument("target", nargs="?", help="file, folder or model name; none: the installation")
    command.set_defaults(device="cpu")
    _add_train(add, argv)
    return parser


def _add_generator_options(command: argparse.ArgumentParser) -> None:
    condition = command.add_mutually_exclusive_group()
    condition.add_argument("--class-name", help="name or index of the class, for a class-conditional generator")
    condition.add_argument("--text-emb", help="safetensors file with text_emb [n, c, d] and text_mask [n, c]")
    condition.add_argument("--text", help="caption, embedded by an umT5 encoder (needs the text extra)")
    command.add_argument("--text-encoder", help="folder or hub id of the encoder (default: the umT5 of that width)")
    command.add_argument("--tokenizer", help="model that decodes (default: the one the generator names)")
    command.add_argument("--n", type=_at_least(1), help="videos (default: one, or one a caption)")
    command.add_argument("--frames", type=_at_least(1), default=5, help="latent frames (default: 5, 17 frames)")
    command.add_argument("--fps", type=float, default=8.0, help="frames a second of the videos (default: 8)")
    command.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    command.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
    command.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    command.add_argument("--min-p", type=float, help="leave out tokens below this share of the likeliest one")
    command.add_argument("--token-guidance", type=float, help="guidance scale of the tokens (default: off)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    command.add_argument("--int8", action="store_true", help="keep the generator's matrices as int8")
    command.add_argument("--tokens-only", action="store_true", help="write .vft files (NAME-0.vft, ... for several)")


def _add_bench_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", choices=("encode", "decode", "generate"), help="random frames or ids serve as input")
    command.add_argument("--batch", type=_at_least(1), default=1, help="samples in one call (default: 1)")
    command.add_argument("--frames", type=_at_least(1), default=5, help="latent frames (default: 5, 17 frames)")
    command.add_argument("-k", "--keep", type=_at_least(1), help="registers, or tokens, of every latent frame")
    command.add_argument("--size", type=_at_least(16), help="side of the frames, where the model takes any size")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    command.add_argument("--int8", action="store_true", help="generate: keep the matrices as int8")
    command.add_argument("--temperature", type=float, default=1.0, help="generate: of the tokens (default: 1)")
    command.add_argument("--token-guidance", type=float, help="generate: guidance scale (default: off)")
    command.add_argument("--seconds", type=float, default=2.0, help="how long it is timed (default: 2)")
    command.add_argument("--profile", action="store_true", help="print the time of each op and its share of the bound")
    command.add_argument("--trace", type=Path, help="with --profile: Chrome trace to write, .json")
    command.add_argument("--top", type=_at_least(1), default=15, help="with --profile: ops shown (default: 15)")


def _add_train(add, argv: list[str]) -> None:
    command = add("train", None, "Train a tokenizer or a generator on procedural video.", _seed_option())
    kinds = ("tokenizer", "generator")
    command.add_argument("kind", nargs="?", choices=kinds, default=kinds[0], help="what to train (default: tokenizer)")
    # the trainers are imported only where they are asked for, and bring their own arguments
    if argv[:1] == ["train"]:
        kind = next((a for a in argv[1:] if a in kinds), kinds[0])
        trainer = importlib.import_module(f"vft.train.{kind}")
        trainer.add_arguments(command)
        command.set_defaults(run=trainer.run)


def _base() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), help="kernels to use (default: the best there is)")
    parser.add_argument("--threads", type=_at_least(1), help="CPU threads (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", help=f"name, folder, .safetensors file or org/repo (default: {DEFAULT_MODEL})")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    return parser


def _seed_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seed", type=_at_least(0), default=0, help="seed of all random numbers (default: 0)")
    return parser


def _sampler_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_seed_option()])
    parser.add_argument("--steps", type=_at_least(1), help="solver steps (default: the model's)")
    parser.add_argument("--solver", choices=tuple(SOLVERS), default="euler", help="ODE solver (default: euler)")
    parser.add_argument("--guidance", help="none, cfg:SCALE, apg or apg:SCALE (default: the model's)")
    return parser


def _output_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    suffixes = ", ".join(video.OUTPUT_FORMATS)
    parser.add_argument("-o", "--output", required=True, help=f"{suffixes} file, replaced if it exists")
    parser.add_argument("-k", "--keep", type=_at_least(1), help="use the first K registers of every latent frame")
    parser.add_argument("--size", type=_at_least(2), help="side of the square output in pixels (default: as decoded)")
    parser.add_argument("--quality", type=int, default=18, help="0 (best) to 51 (smallest); default: 18")
    return parser


if __name__ == "__main__":
    sys.exit(main())

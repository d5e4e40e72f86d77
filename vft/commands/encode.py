"""``vft encode``: a video file to a .vft file, or a folder of them to a folder."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from vft import reading

from . import options

HELP = "Turn a video into a .vft file of tokens, or a folder of videos into many."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_memory(parser)
    add = parser.add_argument
    add("input", help="video file of any size, rate and length, or a folder; -: standard input")
    add(
        "-o", "--output", "--out", required=True,
        help=".vft file, replaced if it exists; with --batch a folder; -: standard output",
    )  # fmt: skip
    add("-k", "--keep", type=options.at_least(1), help="keep the first K registers of every latent frame")
    add("--psnr", type=float, metavar="DB", help="keep as few registers as decode to this PSNR")
    add("--tokens", type=options.at_least(1), help="keep as many registers as give at most this many tokens")
    add("--predictor", metavar="FILE", help="of vft train budget: with --psnr, instead of decoding to see")
    add("--batch", action="store_true", help="input and output are folders; finished videos are kept")
    add("--packed", type=options.at_least(1), default=8, help="with --batch: chunks in one call (default: 8)")
    add("--shards", choices=("tar", "parquet"), help="a folder to a folder of shards, see docs/data.md")
    add("--shard-size", type=options.at_least(1), default=1000, help="videos of a shard (default: 1000)")
    add("--engine", choices=("ray", "daft"), help="spread shards over processes or machines (default: this process)")
    add("--workers", type=options.at_least(1), help="of the engine (default: one a GPU, else one a core)")
    add("--readers", type=options.at_least(1), default=2, help="with --batch: reading threads (default: 2)")
    reading.add_reading(parser)


def run(args: argparse.Namespace) -> int | None:
    """Returns 1 where a video of the folder failed."""
    chosen = [name for name in ("psnr", "tokens", "predictor") if getattr(args, name) is not None]
    if chosen and (args.shards or args.engine or args.batch or args.keep is not None):
        raise ValueError(
            f"--{chosen[0]} chooses the registers of one video: leave out -k, --batch, --shards and --engine"
        )
    if args.predictor is not None and args.psnr is None:
        raise ValueError("--predictor needs --psnr")
    if args.shards or args.engine:
        return _run_shards(args)
    if args.batch:
        return _run_folder(args)
    if os.path.isdir(args.input):
        raise ValueError(f"{args.input} is a folder: add --batch to encode every video in it")
    from vft.files import check_new, check_output
    from vft.video.audio import sidecar

    to_stdout = args.output == "-"
    if to_stdout and args.audio == "copy":
        raise ValueError("--audio copy needs an output file, beside which the audio is put")
    if not to_stdout:
        check_output(args.output, [args.input, args.model, args.predictor])
        if args.audio == "copy" and not os.path.exists(args.output):
            # beside tokens that are replaced, their audio is too
            check_new(sidecar(args.output), "remove it, or give another -o")
    tokenizer = options.load_tokenizer(args)
    options.check_keep(args.keep, tokenizer.registers)
    with _as_file(args.input) as path:
        tokens = _encode(tokenizer, path, args)
        if args.keep is not None:
            tokens = tokens.truncate(args.keep)
        if to_stdout:
            sys.stdout.buffer.write(tokens.to_bytes())
        else:
            tokens.save(args.output)
        _carry_audio(args, path)
    if to_stdout:
        return
    print(f"{args.output}: {options.describe(tokens)}, {os.path.getsize(args.output)} bytes")


def _encode(tokenizer, path: str, args: argparse.Namespace):
    """The tokens of one video, with a progress bar over its frames."""
    from vft.budget import Predictor
    from vft.progress import bar as progress_bar
    from vft.video import probe_video

    predictor = None if args.predictor is None else Predictor.load(args.predictor)
    # another rate makes more or fewer of them
    total = None if args.fps else probe_video(path).frames or None
    with progress_bar(desc="encode", unit="frame", total=total) as bar:
        return tokenizer.encode(
            path, fps=args.fps, strict=args.strict, target_psnr=args.psnr, budget=args.tokens, predictor=predictor,
            progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip


def _carry_audio(args: argparse.Namespace, path: str) -> None:
    from vft.video import audio, probe_video

    if args.audio == "copy":
        audio.save_audio(path, args.output)
    elif probe_video(path).audio:
        print(f"vft: warning: {args.input}: its audio is left out (--audio copy keeps it)", file=sys.stderr)


@contextmanager
def _as_file(path: str) -> Iterator[str]:
    """The path of a video; standard input goes through a file, because an index may stand at its end."""
    if path != "-":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "standard input")
        with open(name, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield name


def _run_folder(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from vft import batch
    from vft.progress import bar as progress_bar

    if "-" in (args.input, args.output):
        raise ValueError("input and output must be folders with --batch, got '-'")
    rank, world_size = batch.shard()
    local_rank = os.environ.get("LOCAL_RANK")
    if args.device in (None, "cuda") and local_rank is not None and torch.cuda.is_available():
        args.device = f"cuda:{local_rank}"
    tokenizer = options.load_tokenizer(args)
    options.check_keep(args.keep, tokenizer.registers)
    with progress_bar(desc=f"encode {rank + 1}/{world_size}", unit="video", position=rank) as bar:

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
    if summary.silent:
        print(f"vft: warning: {summary.silent} audio tracks are left out (--audio copy keeps them)", file=sys.stderr)
    return _report(args, summary, rank)


def _run_shards(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from vft.batch import shard
    from vft.data import Encoder, encode, engines
    from vft.progress import bar as progress_bar

    if "-" in (args.input, args.output) or args.batch or args.audio == "copy" or args.checksum or args.memory:
        raise ValueError(
            "--shards and --engine take folders, and go without --batch, --audio copy, --checksum and --memory"
        )
    rank, world_size = shard()
    if args.engine and world_size > 1:
        raise ValueError("--engine starts its own processes: run it once, not under torchrun")
    gpus = torch.cuda.device_count() if args.device in (None, "cuda") else 0
    engine = encode.here
    if args.engine:
        engine = engines.make(args.engine, args.workers or gpus or os.cpu_count() or 1, 1.0 if gpus else 0.0)
    local = f"cuda:{os.environ['LOCAL_RANK']}" if gpus and "LOCAL_RANK" in os.environ else args.device
    encoder = Encoder(
        args.model or options.DEFAULT_MODEL, keep=args.keep, device=local, packed=args.packed, readers=args.readers,
        fps=args.fps, strict=args.strict,
    )  # fmt: skip
    options.check_keep(args.keep, encoder.model.load().registers)
    with progress_bar(desc="encode", unit="video") as bar:

        def progress(done: int, total: int, errors: list[dict[str, str]]) -> None:
            bar.total = total
            bar.update(done - bar.n)
            for row in errors:
                tqdm.write(f"vft: error: {row['key']}: {row['error']}", sys.stderr)

        summary = encode.encode_shards(
            args.input, args.output, encoder, kind=args.shards or "tar", shard_size=args.shard_size, engine=engine,
            rank=rank, world_size=world_size, progress=progress,
        )  # fmt: skip
    return _report(args, summary, rank)


def _report(args: argparse.Namespace, summary, rank: int) -> int:
    if rank == 0:
        reading.print_left_out(summary.left_out)
    counts = f"{summary.encoded} encoded, {summary.skipped} there already, {summary.failed} failed"
    print(f"{args.output}: {counts}" + (f", {len(summary.left_out)} left out" if summary.left_out else ""))
    return 1 if summary.failed else 0

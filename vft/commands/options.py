"""Arguments that several commands have, and what they stand for."""

from __future__ import annotations

import argparse
from dataclasses import replace

DEFAULT_MODEL = "tiny"
# what generates from a caption unless another model is asked for
TEXT_MODEL = "tiny_text"
# malloc.h's name for it, and the bytes from which memory is mapped by itself
_M_MMAP_THRESHOLD, _MAPPED = -3, 4 << 20
# those of flexkernels.library and of vft.solver, whose import would need torch
BACKENDS = ("reference", "cpu", "triton", "cuda")
SOLVERS = ("euler", "midpoint", "heun", "rk4", "ab2", "ab3", "dpm2m")


def at_least(smallest: int):
    """An argument's type: an int of at least this."""

    def integer(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    return integer


def size_in_bytes(text: str) -> int:
    """An argument's type: 800M, 4G or 1.5G, of 1024 a step."""
    number, unit = text[:-1], text[-1:].upper()
    try:
        count = int(float(number) * 1024 ** (1 + "KMGT".index(unit or " ")))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a number and K, M, G or T, such as 4G, got {text!r}")
    return count


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every command has."""
    parser.add_argument("--backend", choices=("auto", *BACKENDS), help="kernels to use (default: the best there is)")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"name, folder, .safetensors file or org/repo (default: {DEFAULT_MODEL})")
    parser.add_argument("--unchecked-weights", action="store_true", help="do not look for NaN in the model's weights")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", type=size_in_bytes, metavar="SIZE",
        help="what VidTok may take beyond the weights, such as 4G: computes frames in tiles, time in pieces",
    )  # fmt: skip


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of all random numbers (default: 0)")


def add_sampler(parser: argparse.ArgumentParser) -> None:
    add_seed(parser)
    parser.add_argument("--steps", type=at_least(1), help="solver steps (default: the model's)")
    parser.add_argument("--solver", choices=SOLVERS, default="euler", help="ODE solver (default: euler)")
    parser.add_argument("--guidance", help="none, cfg:SCALE, apg or apg:SCALE (default: the model's)")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="times, noise is 1, at which --guidance holds; elsewhere its pass is left out",
    )  # fmt: skip
    parser.add_argument(
        "--null-every", type=at_least(1), metavar="N",
        help="compute guidance's unconditional pass in every Nth evaluation alone (default: 1)",
    )  # fmt: skip


def add_video_output(parser: argparse.ArgumentParser) -> None:
    suffixes = ".mp4, .mov, .mkv, .gif"
    parser.add_argument("-o", "--output", required=True, help=f"{suffixes} file, replaced if it exists")
    parser.add_argument("-k", "--keep", type=at_least(1), help="use the first K registers of every latent frame")
    parser.add_argument("--size", type=at_least(2), help="side of the square output in pixels (default: as decoded)")
    parser.add_argument("--quality", type=int, default=18, help="0 (best) to 51 (smallest); default: 18")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")


def sampler(args: argparse.Namespace) -> dict:
    """The sampler's options that were given; the others are left to the model."""
    options = {"seed": args.seed, "solver": args.solver}
    if args.null_every is not None:
        options["null_every"] = args.null_every
    if args.steps is not None:
        options["steps"] = args.steps
    if args.guidance is not None:
        options["guidance"] = guidance(args.guidance)
    if args.interval is not None:
        if options.get("guidance") is None:
            raise ValueError("--interval needs --guidance, cfg:SCALE, apg or apg:SCALE")
        from vft.solver import interval

        scale = interval(options["guidance"].scale, *args.interval)
        options["guidance"] = replace(options["guidance"], scale=scale)
    return options


def guidance(text: str):
    """``none``, ``cfg:SCALE``, ``apg`` or ``apg:SCALE`` as the library takes it; ValueError for anything else."""
    from flexkernels import APG, CFG

    kind, _, scale = text.partition(":")
    try:
        if kind == "none" and not scale:
            return None
        if kind == "cfg":
            return CFG(float(scale))
        if kind == "apg":
            return APG(scale=float(scale)) if scale else APG()
    except ValueError as error:
        raise ValueError(f"guidance {text!r}: {error}") from error
    raise ValueError(f"guidance must be none, cfg:SCALE, apg or apg:SCALE, got {text!r}")


def device(args: argparse.Namespace):
    """The torch.device that ``--device`` asks for. Raises ValueError for CUDA where there is none."""
    import torch

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(name)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available on this machine")
    return chosen


def return_memory() -> None:
    """From now on what this process frees goes back to the system, where glibc would keep parts below 32 MB."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def load_tokenizer(
    args: argparse.Namespace, reference: str | None = None, dtype: str = "float32", weights: str | None = None
):
    """The tokenizer that ``reference``, else ``--model``, and ``--device`` ask for."""
    import torch

    from vft import Tokenizer

    reference = reference or args.model or DEFAULT_MODEL
    kind = {"dtype": getattr(torch, dtype), "weights": weights, "check_finite": not args.unchecked_weights}
    tokenizer = Tokenizer.from_pretrained(reference, device=device(args), **kind)
    if getattr(args, "memory", None) is not None:
        if not hasattr(tokenizer.codec, "memory"):
            raise ValueError(
                f"--memory bounds the codec VidTok, {reference} has {tokenizer.codec.name!r}: leave it out"
            )
        tokenizer.codec.memory = args.memory
        return_memory()
    return tokenizer


def add_weights(parser: argparse.ArgumentParser, int8: str = "", fp8: str = "") -> None:
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--int8", action="store_true", help=f"{int8}keep the generator's matrices as int8")
    kind.add_argument("--fp8", action="store_true", help=f"{fp8}keep matrices as fp8, for GPUs that multiply it")


def load_generator(args: argparse.Namespace):
    """The generator that ``--model``, ``--device``, ``--dtype``, ``--int8`` and ``--fp8`` ask for."""
    import torch

    from vft import Generator

    kind = {"dtype": getattr(torch, args.dtype), "weights": "int8" if args.int8 else "fp8" if args.fp8 else None}
    kind["check_finite"] = not args.unchecked_weights
    return Generator.from_pretrained(args.model or DEFAULT_MODEL, device=device(args), **kind)


def check_keep(keep: int | None, registers: int) -> None:
    if keep is not None and keep > registers:
        raise ValueError(f"keep must be between 1 and {registers}, got {keep}")


def check_video_output(path: str, *inputs: str | None) -> None:
    """Raises ValueError or OSError, before any work, where no video can be written to a path or it is an input's."""
    from vft.files import check_output
    from vft.video import output_format

    output_format(path)
    check_output(path, inputs)


def describe(tokens) -> str:
    return f"{tokens.latent_frames} x {tokens.registers} = {tokens.ids.numel()} tokens"

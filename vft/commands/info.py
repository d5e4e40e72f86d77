"""``vft info``: facts about a .vft file, a video file or a model; without an argument, about the installation."""

from __future__ import annotations

import argparse
import math
import os

from . import options

HELP = "Print facts about a .vft file, a video, a model, or the installation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="file, folder or model name; none: the installation")


def run(args: argparse.Namespace) -> None:
    if args.target is None:
        from flexkernels import info as installation

        installation.main([])
        return
    facts = _facts(args.target)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _facts(target: str) -> dict:
    from vft import checkpoint

    if os.path.isdir(target) or target.endswith(".safetensors") or not (os.path.exists(target) or _names_file(target)):
        return _generator(target) if "cond" in checkpoint.read(target)[0] else _tokenizer(target)
    return _tokens(target) if _is_tokens(target) else _video(target)


def _names_file(target: str) -> bool:
    from vft.video import OUTPUT_FORMATS

    return target.endswith((".vft", *OUTPUT_FORMATS))


def _is_tokens(path: str) -> bool:
    from vft.tokens import MAGIC

    if path.endswith(".vft"):
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _tokenizer(target: str) -> dict:
    from vft import Tokenizer

    model = Tokenizer.from_pretrained(target)
    levels = model.config.levels
    return {
        "kind": "model", "name": model.name, "fingerprint": model.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
        "frame size": f"{model.size}x{model.size}" if model.size else "any multiple of 16",
        "chunk": f"{model.config.chunk_size} frames", "registers": model.registers,
        "codebook": f"{math.prod(levels)} ids, levels {','.join(map(str, levels))}",
        "decodes in": f"{model.steps} steps, guidance {model.guidance or 'none'}",
    }  # fmt: skip


def _generator(target: str) -> dict:
    from vft import Generator

    model = Generator.from_pretrained(target)
    config = model.config
    condition = f"{config.n_classes} classes" if config.cond == "class" else f"text, {config.ctx_dim} channels"
    return {
        "kind": "generator", "name": model.name, "parameters": sum(p.numel() for p in model.parameters()),
        "depth": config.depth, "condition": condition, "classes": ", ".join(model.classes) or "without names",
        "longest": f"{config.seq_len} tokens", "codebook": f"{config.vocab} ids",
        "tokenizer": config.tokenizer or "not stated",
    }  # fmt: skip


def _tokens(target: str) -> dict:
    from vft import VideoTokens

    tokens = VideoTokens.load(target)
    return {
        "kind": "tokens", "model": tokens.model, "fingerprint": tokens.fingerprint or "not stated",
        "tokens": options.describe(tokens), "frames": tokens.frames,
        "fps": f"{tokens.fps:g}", "source size": f"{tokens.width}x{tokens.height}",
        "codebook": f"{tokens.codebook_size} ids, levels {','.join(map(str, tokens.levels))}",
        "bytes": os.path.getsize(target),
    }  # fmt: skip


def _video(target: str) -> dict:
    from vft.video import probe_video

    probe = probe_video(target)
    return {
        "kind": "video", "container": probe.container, "codec": probe.codec, "size": f"{probe.width}x{probe.height}",
        "frames": probe.frames or "not stated", "fps": f"{probe.fps:g}", "audio": probe.audio or "none",
        "bytes": os.path.getsize(target),
    }  # fmt: skip

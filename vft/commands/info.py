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
    for number, facts in enumerate(_facts(args.target)):
        width = max(map(len, facts))
        print("\n" * bool(number), end="")
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")


def _facts(target: str) -> list[dict]:
    from vft import checkpoint

    embedded = {_tokenizer: checkpoint.embedded_models(), _generator: checkpoint.embedded_models(checkpoint.GENERATOR)}
    if found := [facts(target) for facts, names in embedded.items() if target in names]:
        return found
    if os.path.isdir(target) or target.endswith(".safetensors") or not (os.path.exists(target) or _names_file(target)):
        return [_generator(target) if "cond" in checkpoint.read(target)[0] else _tokenizer(target)]
    return [_tokens(target) if _is_tokens(target) else _video(target)]


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
        "parameters": _parameters(model, target),
        "frame size": f"{model.size}x{model.size}" if model.size else "any multiple of 16",
        "chunk": f"{model.config.chunk_size} frames", "registers": model.registers,
        "codebook": f"{math.prod(levels)} ids, levels {','.join(map(str, levels))}",
        "codec": model.config.codec + _refiner(model),
        "memory": f"{sum(p.numel() for p in model.parameters()) * 4 / 2**20:.0f} MiB of weights in float32",
        "decodes in": f"{model.steps} steps, guidance {model.guidance or 'none'}",
    }  # fmt: skip


def _refiner(model) -> str:
    from vft.codec import EMBEDDED

    # the weights of other codecs may lie elsewhere
    refiner = model.codec.refiner if model.codec_state and model.config.codec in EMBEDDED else None
    return "" if refiner is None else f", and a refiner of {sum(p.numel() for p in refiner.parameters())} parameters"


def _parameters(model, target: str, suffix: str = "") -> str:
    """As many as compute and, where that differs, as are stored."""
    from vft import checkpoint

    effective = sum(p.numel() for p in model.parameters())
    tensors = checkpoint.read(target, suffix)[1]
    stored = sum(t.numel() for name, t in tensors.items() if not name.startswith(checkpoint.CODEC_PREFIX))
    return f"{effective}" if stored == effective else f"{stored} stored, {effective} effective"


def _generator(target: str) -> dict:
    from vft import Generator, checkpoint, words

    model = Generator.from_pretrained(target)
    config, frames = model.config, model.config.trained_frames
    per_frame = config.seq_len // frames
    memory = model.memory(1, frames, per_frame)["total"]
    if config.cond == "class":
        condition = {
            "condition": f"{config.n_classes} classes", "classes": ", ".join(model.classes) or "without names",
        }  # fmt: skip
    else:
        condition = {"condition": f"text, {config.ctx_dim} channels"}
        if config.ctx_dim == words.WIDTH:
            condition["captions"] = f"of the words {', '.join(words.WORDS)}"
    return {
        "kind": "generator", "name": model.name, "parameters": _parameters(model, target, checkpoint.GENERATOR),
        "depth": config.depth, **condition,
        "makes": f"{frames} latent frames of {per_frame} tokens; at most {config.seq_len} tokens",
        "memory": f"{memory / 2**20:.0f} MiB for one guided sample in float32", "codebook": f"{config.vocab} ids",
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

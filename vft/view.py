"""A page that shows what tokens hold: one HTML file with its pictures, style and script in it, and no address.

A clip of the page is a dict, JSON in the page:

    name, note: str; fps: float; frames, width, height: int; cut: whether frames after these are left out;
    columns: frames in a row of a sheet
    source: sheet or None; levels: [{k, tokens, bytes, psnr (None without a source), sheet}]
    registers: [{share, map}]

A sheet is a picture of all frames, ``columns`` a row, as a data URI; a map one picture of where a register matters.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .deferred import Image
from .files import replacing
from .metrics import frames_psnr
from .tokens import MAGIC, VideoTokens
from .video import Video, preprocess, read_video, to_uint8

TEMPLATE = Path(__file__).parent / "assets" / "view.html"
# frames of a video that a page takes in, and registers that it draws maps of
MOST_FRAMES, MOST_MAPS = 129, 32
# pixels of a sheet up to which it is PNG, and not JPEG
LOSSLESS = 1 << 20
JPEG_QUALITY = 92


def describe(
    tokenizer, tokens: VideoTokens, source: torch.Tensor | None = None, *, name: str, note: str = "",
    maps: int = MOST_MAPS, seed: int = 0, **sampler,
) -> dict:  # fmt: skip
    """A clip of the page: ``tokens`` decoded from their first 1, 2, 4, ... and all registers.

    ``source`` (uint8 ``[T, H, W, 3]``, at the size that the tokens decode to) is what they were made of, where it is
    known. Videos are cut after ``MOST_FRAMES`` frames. ``maps``: registers whose maps are drawn, 0 for none.
    ``sampler`` (steps, guidance, ...) goes to ``tokenizer.decode``.

    Raises ValueError for a source of another size, or tokens of another model.
    """
    cut, tokens = tokens.frames > MOST_FRAMES, shortened(tokens)
    if source is not None:
        source = source[: tokens.frames]
    if source is not None and len(source) != tokens.frames:
        raise ValueError(f"source must have the tokens' {tokens.frames} frames, got {len(source)}")
    clip = {"name": name, "fps": tokens.fps, "frames": tokens.frames, "cut": cut, "note": note, "levels": []}
    for k in budgets(tokens.registers):
        coarse = tokens.truncate(k)
        frames = to_uint8(tokenizer.decode(coarse, seed=seed, **sampler)).cpu()
        psnr = None if source is None else frames_psnr(frames, source)
        clip["levels"].append(
            {
                "k": k, "tokens": coarse.ids.numel(), "bytes": coarse.nbytes,
                # infinity is no JSON
                "psnr": psnr if psnr is None or math.isfinite(psnr) else 99.0, "sheet": sheet(frames),
            }
        )  # fmt: skip
    clip |= {"height": frames.shape[1], "width": frames.shape[2], "columns": columns(len(frames))}
    clip["source"] = None if source is None else sheet(source)
    clip["registers"] = register_maps(tokenizer, tokens, min(maps, tokens.registers), seed, **sampler)
    return clip


def of_file(tokenizer, path: str | os.PathLike, source: str | os.PathLike | None = None, **options) -> dict:
    """The clip of a ``.vft`` file, with the video ``source`` that it was made of beside it if that is given, or of a
    video file, encoded first. ``options`` are those of :func:`describe`.

    Raises ValueError for an unreadable file, or tokens of another model; OSError where a file is missing.
    """
    path = Path(path)
    with open(path, "rb") as file:
        stored = file.read(len(MAGIC)) == MAGIC
    if stored:
        tokens = VideoTokens.load(path)
        video = None if source is None else _read(tokenizer, source)
    else:
        video = _read(tokenizer, path)
        tokens = tokenizer.encode(video)
    frames = None if video is None else to_uint8(preprocess(video.frames, tokenizer.size))
    note = (
        f"{tokens.frames} frames of {tokens.width} x {tokens.height} at {tokens.fps:g} a second: "
        f"{tokens.latent_frames} x {tokens.registers} tokens of the model {tokens.model!r}."
    )
    return describe(tokenizer, tokens, frames, **{"name": path.name, "note": note} | options)


def _read(tokenizer, path) -> Video:
    # one more tells that there are more
    return read_video(path, tokenizer.size, MOST_FRAMES + 1)


def budgets(registers: int) -> list[int]:
    """1, 2, 4, ... and all registers."""
    return sorted({2**i for i in range(registers.bit_length()) if 2**i <= registers} | {registers})


def shortened(tokens: VideoTokens, most: int = MOST_FRAMES) -> VideoTokens:
    """The first ``most`` frames of tokens, in whole latent frames."""
    if tokens.frames <= most:
        return tokens
    fields = {name: getattr(tokens, name) for name in ("fps", "height", "width", "model", "levels", "chunk")}
    # four frames a latent frame, behind the first
    rows = tokens.ids[: 1 + -(-(most - 1) // 4)]
    return VideoTokens(rows, frames=most, fingerprint=tokens.fingerprint, **fields)


@torch.no_grad()
def register_maps(tokenizer, tokens: VideoTokens, count: int, seed: int = 0, **sampler) -> list[dict]:
    """Where a clip's first chunk changes when one register's tokens are drawn anew in all its frames.

    For each of the first ``count`` registers its ``share`` of all their change, and ``map``: the root of the mean
    absolute change of pixels over time and colours, a picture whose white is the strongest change of any register.
    """
    if count == 0:
        return []
    rows = tokens.ids[: 1 + (tokens.chunk - 1) // 4]
    generator = torch.Generator().manual_seed(seed)
    height, width = tokenizer.frame_size(tokens)
    shape = tokenizer.codec.latent_shape(1 + 4 * (len(rows) - 1), height, width)
    noise = torch.randn(shape, generator=generator).to(tokenizer.device)

    def pixels(ids: list[torch.Tensor]) -> torch.Tensor:
        latents = tokenizer.decode_latents(ids, noise=[noise] * len(ids), **sampler)
        return tokenizer.codec.decode(torch.stack(latents)).clamp(-1, 1)

    own, changes = pixels([rows]), []
    for r in range(count):
        swapped = rows.clone()
        swapped[:, r] = torch.randint(tokens.codebook_size, (len(rows),), generator=generator)
        changes.append((pixels([swapped]) - own).abs().mean((0, 1, 2)))
    changes = torch.stack(changes).cpu()
    strength, peak = changes.mean((1, 2)), float(changes.max().clamp(min=1e-9))
    shares = (strength / strength.sum().clamp(min=1e-9)).tolist()
    pictures = ((changes / peak).sqrt() * 255).byte().numpy()
    return [{"share": s, "map": data_uri(p)} for s, p in zip(shares, pictures, strict=True)]


def columns(frames: int) -> int:
    """Frames in a row of a sheet: nearly square, so that no browser's limit on sides is met."""
    return math.ceil(math.sqrt(frames))


def sheet(frames: torch.Tensor) -> str:
    """uint8 ``[T, H, W, 3]`` -> one picture with ``columns(T)`` frames a row, black where none is, as a data URI."""
    count, height, width, _ = frames.shape
    across = columns(count)
    out = np.zeros((-(-count // across) * height, across * width, 3), np.uint8)
    for i, frame in enumerate(frames.numpy()):
        y, x = i // across * height, i % across * width
        out[y : y + height, x : x + width] = frame
    return data_uri(out)


def data_uri(pixels: np.ndarray) -> str:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` as PNG, or JPEG where large."""
    file, kind = io.BytesIO(), "png" if pixels.shape[0] * pixels.shape[1] <= LOSSLESS else "jpeg"
    options = {"optimize": True} if kind == "png" else {"quality": JPEG_QUALITY}
    Image.fromarray(pixels).save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def page(clips: Sequence[dict], title: str, credit: str = "") -> str:
    """The HTML of ``clips``. Raises ValueError where there is none."""
    if not clips:
        raise ValueError("clips must hold at least one clip, got none")
    # "<" ends no script and begins no comment inside a JSON string
    payload = json.dumps(list(clips), allow_nan=False).replace("<", "\\u003c")
    values = {"TITLE": html.escape(title), "CREDIT": html.escape(credit), "PAYLOAD": payload}
    return re.sub(r"{{([A-Z]+)}}", lambda mark: values[mark[1]], TEMPLATE.read_text(encoding="utf-8"))


def write(path: str | os.PathLike, clips: Sequence[dict], title: str, credit: str = "") -> None:
    """Writes the page, complete or not at all. Raises OSError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(page(clips, title, credit), encoding="utf-8")

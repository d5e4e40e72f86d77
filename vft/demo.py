"""``vft demo``: the shipped clip, tokenized and reconstructed from more and more of its tokens."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vft import progress, view
from vft.deferred import Image, ImageDraw, ImageFont
from vft.files import check_output, replacing
from vft.metrics import frames_psnr
from vft.tokens import VideoTokens
from vft.video import contact_sheet, preprocess, read_video, to_uint8, write_video

CLIP = Path(__file__).parent / "assets" / "bunny.mp4"
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"
KEEPS = (1, 8, 32)
FILES = ("demo.mp4", "demo.png", "demo.html")


@dataclass(frozen=True, eq=False)
class Result:
    """A reconstruction from the first registers of ``tokens``: uint8 ``[T, H, W, 3]`` frames, dB and seconds."""

    tokens: VideoTokens
    frames: torch.Tensor
    psnr: float
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.tokens.registers} token{'s' if self.tokens.registers > 1 else ''} a frame"


def run(tokenizer, folder: str | os.PathLike, **options) -> list[Result]:
    """Write ``demo.mp4``, ``demo.png`` and the page ``demo.html`` into ``folder`` (made if missing) and print a table.

    ``options`` (steps, guidance, seed, ...) go to ``tokenizer.decode``.

    Raises:
        OSError: the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    movie, picture, page = (check_output(folder / name) for name in FILES)
    video = read_video(CLIP, tokenizer.size)
    source = to_uint8(preprocess(video.frames, tokenizer.size))
    start = time.perf_counter()
    tokens = tokenizer.encode(video)
    print(
        f"{CLIP.name}: {tokens.frames} frames of {tokens.width}x{tokens.height}, shown to the model at "
        f"{source.shape[2]}x{source.shape[1]}; encoded in {time.perf_counter() - start:.1f} s to "
        f"{tokens.latent_frames} x {tokens.registers} tokens"
    )
    results = reconstruct(tokenizer, tokens, source, **options)
    panels = [("source", source)] + [(f"{r.label}, {r.psnr:.1f} dB", r.frames) for r in results]
    write_video(movie, side_by_side(panels, CREDIT), video.fps)
    rows = [(f"source\n{source.shape[2]}x{source.shape[1]}", source)]
    rows += [(f"{r.label}\n{r.psnr:.1f} dB", r.frames) for r in results]
    with replacing(picture) as temporary:
        contact_sheet(rows, footer=CREDIT).save(temporary, format="png")
    clip = view.describe(tokenizer, tokens, source, name=CLIP.name, **options)
    view.write(page, [clip], "From one token a frame to all", CREDIT)
    print(table(results, source))
    print(f"wrote {movie}, {picture} and {page}\n{CREDIT}")
    return results


def reconstruct(tokenizer, tokens: VideoTokens, source: torch.Tensor, **options) -> list[Result]:
    """Decode from the first 1, 8, 32 and all registers; compare with ``source`` (uint8 ``[T, H, W, 3]``)."""
    keeps = [k for k in KEEPS if k < tokens.registers] + [tokens.registers]
    results = []
    for k in progress.bar(keeps, desc="decode", unit="clip"):
        coarse = tokens.truncate(k)
        start = time.perf_counter()
        frames = to_uint8(tokenizer.decode(coarse, **options)).cpu()
        seconds = time.perf_counter() - start
        results.append(Result(coarse, frames, frames_psnr(frames, source), seconds))
    return results


def table(results: list[Result], source: torch.Tensor) -> str:
    """Sizes, quality and decoding time as text; bits per pixel count the tokens and the pixels the model works at."""
    lines = [f"{'k':>4} {'tokens':>7} {'bytes':>6} {'bits/pixel':>10} {'PSNR dB':>8} {'seconds':>8}"]
    for r in results:
        size = r.tokens.nbytes
        bits = 8 * size / math.prod(source.shape[:3])
        count = r.tokens.ids.numel()
        lines.append(f"{r.tokens.registers:>4} {count:>7} {size:>6} {bits:>10.4f} {r.psnr:>8.2f} {r.seconds:>8.2f}")
    return "\n".join(lines)


def side_by_side(panels: list[tuple[str, torch.Tensor]], footer: str, tile: int = 192) -> torch.Tensor:
    """Videos of one length next to each other, a caption under each: uint8 ``[T, H, W, 3]``, panels ``tile`` high."""
    gap, caption, small = 8, 28, 20
    count, height, width, _ = panels[0][1].shape
    wide = max(1, round(tile * width / height))
    canvas = Image.new("RGB", (gap + len(panels) * (wide + gap), gap + tile + caption + small), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    lefts = [gap + i * (wide + gap) for i in range(len(panels))]
    for left, (label, _) in zip(lefts, panels, strict=True):
        draw.text((left + wide // 2, gap + tile + caption // 2), label, fill="#202020", font=font, anchor="mm")
    end = (canvas.width // 2, canvas.height - small // 2)
    draw.text(end, footer, fill="#606060", font=ImageFont.load_default(size=12), anchor="mm")
    out = np.repeat(np.asarray(canvas)[None], count, axis=0)
    for left, (_, frames) in zip(lefts, panels, strict=True):
        for t, frame in enumerate(frames.cpu().numpy()):
            image = Image.fromarray(frame).resize((wide, tile), Image.Resampling.BICUBIC)
            out[t, gap : gap + tile, left : left + wide] = np.asarray(image)
    return torch.from_numpy(out)

"""A picture of videos: one row each, for a look at what a model does."""

from __future__ import annotations

import math

import torch

from vft.deferred import Image, ImageDraw, ImageFont

from .frames import check_frames


def contact_sheet(
    rows: list[tuple[str, torch.Tensor]], columns: int = 8, tile: int = 128, footer: str = ""
) -> Image.Image:
    """A picture with one labelled row for each video, its frames evenly spaced over time from first to last.

    Args:
        rows: (label, uint8 ``[T, H, W, 3]``); a label may have several lines. Rows may differ in length and size.
        columns: frames in a row; a shorter video shows each of its frames once.
        tile: height of a frame in the picture, in pixels.
        footer: a line of small text under the rows.

    Raises:
        ValueError: no rows, no columns, or frames of another shape or dtype.
    """
    if not rows or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {len(rows)} and {columns}")
    font = ImageFont.load_default(size=max(10, tile // 8))
    strips = [(label, _tiles(frames, columns, tile)) for label, frames in rows]
    gap = max(2, tile // 32)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 4 * gap + max(math.ceil(measure.multiline_textbbox((0, 0), label, font=font)[2]) for label, _ in strips)
    width = margin + max(sum(image.width + gap for image in images) for _, images in strips)
    bottom = gap + len(strips) * (tile + gap)
    small = ImageFont.load_default(size=max(10, tile // 10))
    sheet = Image.new("RGB", (width, bottom + (2 * small.size if footer else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, bottom + small.size), footer, fill="#606060", font=small, anchor="lm")
    for row, (label, images) in enumerate(strips):
        top = gap + row * (tile + gap)
        draw.multiline_text((2 * gap, top + tile // 2), label, fill="#202020", font=font, anchor="lm")
        left = margin
        for image in images:
            sheet.paste(image, (left, top))
            left += image.width + gap
    return sheet


def _tiles(frames: torch.Tensor, columns: int, tile: int) -> list[Image.Image]:
    check_frames(frames)
    count, height, width, _ = frames.shape
    if count == 0:
        raise ValueError("rows must hold at least one frame each, got none")
    chosen = torch.linspace(0, count - 1, min(columns, count)).round().long()
    size = (max(1, round(tile * width / height)), tile)
    return [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames[chosen].cpu().numpy()]

"""Procedural video with natural-image statistics, for training without a data set.

A clip is a moving "dead leaves" picture (Lee, Mumford, Huang 2001): ellipses, polygons, leaves, rings and blobs of
power-law size occlude each other over a background whose spectrum falls like 1/f, under camera pan, zoom and roll and
the objects' own motion. A clip depends on (seed, index) alone. Units: the frame spans [-1, 1] in x and y, and 16 frames
are one unit of time.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from . import render
from .natural import Filmed
from .scene import FAMILIES, Plan, Scene, generator

# 1: what the embedded models have seen; 2: every second clip as vft.train.natural films it
RECIPES = (1, 2)


def label(seed: int, index: int) -> int:
    """Index into FAMILIES of the motion that dominates clip (seed, index)."""
    return int(generator(seed, index).integers(len(FAMILIES)))


def plan(seed: int, index: int, size: int = 64, frames: int = 17, recipe: int = 1) -> Plan:
    """The random choices of a clip, for :mod:`vft.train.render`; arguments and errors as of :func:`clip`."""
    if size < 1 or frames < 1:
        raise ValueError(f"size and frames must be >= 1, got {size} and {frames}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {RECIPES}, got {recipe!r}")
    rng = generator(seed, index)
    family = FAMILIES[rng.integers(len(FAMILIES))]
    kind = Filmed if recipe == 2 and index % 2 else Scene
    scene = kind(rng, family, size, frames)
    scene.draw_background()
    count = int(rng.integers(6, 17))
    for depth in np.sort(rng.uniform(0.35, 1.5, count)):
        scene.draw_object(depth)
    return scene.plan()


def clip(seed: int, index: int, size: int = 64, frames: int = 17, recipe: int = 1) -> torch.Tensor:
    """Renders one clip: uint8 [frames, size, size, 3], the same for the same (seed, index, size, frames, recipe).

    Raises ValueError for a negative seed or index, a size or frame count below 1, or a recipe that is none of RECIPES.
    """
    return render.one(plan(seed, index, size, frames, recipe))


def batch(
    seed: int, indices, size: int = 64, frames: int = 17, threads: int = 1, recipe: int = 1
) -> torch.Tensor:  # fmt: skip
    """Renders `clip(seed, i)` for every i of indices: float32 [B, 3, frames, size, size] in [-1, 1]."""
    return together(lambda i: clip(seed, i, size, frames, recipe), indices, size, frames, threads)


def together(make: Callable[[int], torch.Tensor], indices, size: int, frames: int, threads: int = 1) -> torch.Tensor:
    """What ``make``, uint8 [frames, size, size, 3], gives for every i of indices, by so many threads: float32
    [B, 3, frames, size, size] in [-1, 1]."""
    video = torch.empty(len(indices), 3, frames, size, size)

    def fill(slot: int) -> None:
        video[slot] = scaled(make(int(indices[slot])))

    if threads <= 1:
        for slot in range(len(indices)):
            fill(slot)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(len(indices))))
    return video


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -4) * (1 / 127.5) - 1.0

"""Procedural clips of one thing that words name: "red disc moving left".

A textured thing of one colour before a background of another clip's kind, whose camera stands still. A clip depends on
(seed, index) alone; units are those of :mod:`vft.train.procedural`.
"""

from dataclasses import replace

import numpy as np
import torch

from ..words import COLOURS, MOTIONS, SHAPES
from . import render
from .scene import OBJECT, SIDES, TAU, Plan, Scene, generator, polygon
from .scene import SHAPES as KINDS

RGB = dict(
    zip(
        COLOURS,
        ((0.85, 0.12, 0.1), (0.95, 0.5, 0.08), (0.95, 0.85, 0.15), (0.15, 0.65, 0.2), (0.12, 0.3, 0.85),
         (0.55, 0.2, 0.7), (0.95, 0.95, 0.95), (0.05, 0.05, 0.06)),
        strict=True,
    )
)  # fmt: skip
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# outlines in the unit circle as :mod:`vft.train.render` has them; the triangle has a tip upwards, as v grows downwards
_SQUARE = polygon(np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]), np.full(4, 0.5**0.5))
_TRIANGLE = polygon(np.array([[0, 1], [0.75**0.5, -0.5], [-(0.75**0.5), -0.5]]), np.full(3, 0.5))
_REST = [0.0] * (3 * SIDES - 3)
OUTLINES = {
    "disc": (KINDS.index("blob"), [1.0, 0.0, 0.0, *_REST]), "ring": (KINDS.index("ring"), [0.75, 0.25, 0.0, *_REST]),
    "square": (KINDS.index("polygon"), _SQUARE), "triangle": (KINDS.index("polygon"), _TRIANGLE),
}  # fmt: skip


def facts(seed: int, index: int) -> tuple[str, str, str]:
    """Colour, shape and motion of clip (seed, index)."""
    return _facts(generator(seed, index))


def caption(seed: int, index: int) -> str:
    """What clip (seed, index) shows, in words of :mod:`vft.words`."""
    return " ".join(facts(seed, index))


def clip(seed: int, index: int, size: int = 64, frames: int = 17) -> torch.Tensor:
    """Renders one clip: uint8 ``[frames, size, size, 3]``. Raises ValueError as :func:`vft.train.procedural.clip`."""
    return render.one(plan(seed, index, size, frames))


def plan(seed: int, index: int, size: int = 64, frames: int = 17) -> Plan:
    """The random choices of a clip, for :mod:`vft.train.render`; arguments and errors as of :func:`clip`."""
    if size < 1 or frames < 1:
        raise ValueError(f"size and frames must be >= 1, got {size} and {frames}")
    rng = generator(seed, index)
    colour, shape, motion = _facts(rng)
    scene = Scene(rng, "still", size, frames)
    scene.draw_background()
    # the background steps back behind what is named
    scene.clip["dim"] = 0.5, 0.22
    look, path = _draw(rng, colour, shape, motion, size, frames)
    made = scene.plan()
    kinds, images = np.array([OUTLINES[shape][0]]), np.array([0, scene.image])
    return replace(made, objects=look[None], motion=path[None], kinds=kinds, images=images)


def _facts(rng) -> tuple[str, str, str]:
    return tuple(str(words[rng.integers(len(words))]) for words in (COLOURS, SHAPES, MOTIONS))


def _draw(rng, colour: str, shape: str, motion: str, size: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """How the thing looks, and its motion ``[T, 7]``."""
    time = np.arange(frames) / 16
    radius, speed = rng.uniform(0.3, 0.5), rng.uniform(0.6, 1.1)
    centre = rng.uniform(-0.35, 0.35, (2, 1)) + np.zeros((2, frames))
    log_scale, angle = np.full(frames, np.log(radius)), rng.uniform(-0.2, 0.2) + np.zeros(frames)
    kind, _, heading = motion.partition(" ")
    if kind == "moving":
        # half of the way before the middle, half after: the thing stays in the picture
        centre += np.outer(HEADINGS[heading], speed * (time - time[-1] / 2))
    elif kind in ("growing", "shrinking"):
        log_scale += (1 if kind == "growing" else -1) * speed * (time - time[-1] / 2)
    elif kind == "turning":
        angle += rng.choice([-1, 1]) * 2 * speed * time
    cos, sin, (x, y) = np.cos(angle) * np.exp(-log_scale), np.sin(angle) * np.exp(-log_scale), -centre
    pixels = np.exp(log_scale) * size / 2
    path = np.stack([cos, sin, cos * x + sin * y, -sin, cos, cos * y - sin * x, pixels], -1)
    look = np.zeros((), OBJECT)
    look["shape"], look["colour"], look["soft"], look["window"] = OUTLINES[shape][1], RGB[colour], 1, (0, size, 0, size)
    # shading across the thing shows that it turns
    look["shade"] = 0.35 * np.cos(rng.uniform(0, TAU)), 0.25
    return look, path.astype(np.float32)

"""Procedural clips of one thing that words name: "red disc moving left".

A textured thing of one colour before a background of another clip's kind, whose camera stands still. A clip depends on
(seed, index) alone; units are those of :mod:`vft.train.procedural`.
"""

import numpy as np
import torch

from ..words import COLOURS, MOTIONS, SHAPES
from .scene import TAU, Scene, generator, plane

RGB = dict(
    zip(
        COLOURS,
        ((0.85, 0.12, 0.1), (0.95, 0.5, 0.08), (0.95, 0.85, 0.15), (0.15, 0.65, 0.2), (0.12, 0.3, 0.85),
         (0.55, 0.2, 0.7), (0.95, 0.95, 0.95), (0.05, 0.05, 0.06)),
        strict=True,
    )
)  # fmt: skip
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# height of a triangle's centre over its base, and of a square's over its side, in the unit circle
TRIANGLE, SQUARE = np.float32(0.5), np.float32(0.5**0.5)


def facts(seed: int, index: int) -> tuple[str, str, str]:
    """Colour, shape and motion of clip (seed, index)."""
    return _facts(generator(seed, index))


def caption(seed: int, index: int) -> str:
    """What clip (seed, index) shows, in words of :mod:`vft.words`."""
    return " ".join(facts(seed, index))


def clip(seed: int, index: int, size: int = 64, frames: int = 17) -> torch.Tensor:
    """Renders one clip: uint8 ``[frames, size, size, 3]``. Raises ValueError as :func:`vft.train.procedural.clip`."""
    if size < 1 or frames < 1:
        raise ValueError(f"size and frames must be >= 1, got {size} and {frames}")
    rng = generator(seed, index)
    colour, shape, motion = _facts(rng)
    scene = Scene(rng, "still", size, frames)
    scene.draw_background()
    # the background steps back behind what is named
    scene.canvas *= 0.5
    scene.canvas += 0.22
    _draw(scene, rng, colour, shape, motion)
    return torch.from_numpy(scene.develop())


def _facts(rng) -> tuple[str, str, str]:
    return tuple(str(words[rng.integers(len(words))]) for words in (COLOURS, SHAPES, MOTIONS))


def _draw(scene: Scene, rng, colour: str, shape: str, motion: str) -> None:
    time = np.arange(scene.canvas.shape[1]) / 16
    radius, speed = rng.uniform(0.3, 0.5), rng.uniform(0.6, 1.1)
    centre = rng.uniform(-0.35, 0.35, (2, 1)) + np.zeros((2, len(time)))
    log_scale, angle = np.full(len(time), np.log(radius)), rng.uniform(-0.2, 0.2) + np.zeros(len(time))
    kind, _, heading = motion.partition(" ")
    if kind == "moving":
        # half of the way before the middle, half after: the thing stays in the picture
        centre += np.outer(HEADINGS[heading], speed * (time - time[-1] / 2))
    elif kind in ("growing", "shrinking"):
        log_scale += (1 if kind == "growing" else -1) * speed * (time - time[-1] / 2)
    elif kind == "turning":
        angle += rng.choice([-1, 1]) * 2 * speed * time
    cos, sin = np.cos(angle) * np.exp(-log_scale), np.sin(angle) * np.exp(-log_scale)
    shift = -centre
    to_local = np.stack(
        [
            np.stack([cos, sin, cos * shift[0] + sin * shift[1]], -1),
            np.stack([-sin, cos, cos * shift[1] - sin * shift[0]], -1),
        ],
        1,
    )
    u, v = plane(to_local, scene.axis, scene.axis)
    pixels = np.exp(log_scale).astype(np.float32)[:, None, None] * np.float32(scene.size / 2)
    alpha = np.clip(0.5 - _distance(shape, u, v) * pixels, 0, 1)
    # shading across the thing shows that it turns
    shade = 1 + 0.35 * np.cos(np.float32(rng.uniform(0, TAU))) * u + 0.25 * v
    paint = np.array(RGB[colour], np.float32)[:, None, None, None] * shade
    scene.canvas += alpha * (paint - scene.canvas)


def _distance(shape: str, u, v):
    """Signed distance to an outline in the unit circle, in local units."""
    if shape == "disc":
        return np.sqrt(u * u + v * v) - 1
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - np.float32(0.75)) - np.float32(0.25)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - SQUARE
    # equilateral, a tip upwards: v grows downwards
    return np.maximum(v, np.float32(0.75**0.5) * np.abs(u) - np.float32(0.5) * v) - TRIANGLE

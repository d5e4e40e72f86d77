"""Procedural scenes as a hand-held camera films them: outlines and soft shadows, shake, lens blur, vignette and noise.

Half of what recipe 2 of :mod:`vft.train.procedural` renders; the motion families are the same.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .scene import TAU, Scene


class Filmed(Scene):
    """A scene with the traces of drawing and filming. Widths are in pixels of a frame of 64, and scale with it."""

    def __init__(self, rng, family, size, frames):
        super().__init__(rng, family, size, frames)
        unit = size / 64
        self.line = rng.uniform(0.6, 1.6) * unit if rng.random() < 0.5 else 0.0
        self.ink = rng.uniform(0.4, 0.95)
        self.shadow = rng.uniform(3, 9) * unit if rng.random() < 0.5 else 0.0
        self.blur = rng.uniform(0.4, 1.6) * unit if rng.random() < 0.6 else 0.0
        self.vignette = rng.uniform(0, 0.35)
        self.noise = rng.uniform(0, 0.03) if rng.random() < 0.6 else 0.0
        self.contrast = rng.uniform(0.8, 1.3)
        # noise has its own numbers: those of a picture do not depend on its size
        self.grain = np.random.default_rng(int(rng.integers(2**62)))

    def _aim_camera(self):
        super()._aim_camera()
        rng = self.rng
        if rng.random() < 0.5 and self.family != "still":
            # two tones of a hand that trembles, in each axis
            rate, phase = rng.uniform(2, 6, (2, 2, 1)), rng.uniform(0, TAU, (2, 2, 1))
            tones = np.sin(TAU * rate * self.time + phase) - np.sin(phase)
            self.pan = self.pan + rng.uniform(0.005, 0.03) * tones.sum(1)

    def _trace(self, region, distance):
        if self.shadow:
            # below the object's edge, fading outwards: the object itself keeps its colour
            near = np.clip(1 - distance / self.shadow, 0, 1) * np.clip(distance, 0, 1)
            region *= 1 - 0.4 * near**2
        if self.line:
            region *= 1 - self.ink * np.clip(self.line - np.abs(distance + self.line), 0, 1)

    def develop(self):
        if self.blur:
            self.canvas = _blurred(self.canvas, self.blur)
        edge = self.axis[None, :] ** 2 + self.axis[:, None] ** 2
        self.canvas *= 1 - np.float32(self.vignette / 2) * edge
        self.canvas -= np.float32(0.5)
        self.canvas *= np.float32(self.contrast)
        self.canvas += np.float32(0.5)
        if self.noise:
            self.canvas += np.float32(self.noise) * self.grain.standard_normal(self.canvas.shape, dtype=np.float32)
        return super().develop()


def _blurred(canvas, sigma):
    """Gaussian blur of frames [3, T, H, W], mirrored at the border as far as there are pixels to mirror."""
    reach = min(int(np.ceil(3 * sigma)), canvas.shape[-1] - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).float()
    frames = F.pad(torch.from_numpy(canvas).flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")
    frames = F.conv2d(F.conv2d(frames, taps[None, None, None]), taps[None, None, :, None])
    return frames.reshape(canvas.shape).numpy()

"""Procedural scenes as a hand-held camera films them: outlines and soft shadows, shake, lens blur, vignette and noise.

Half of what recipe 2 of :mod:`vft.train.procedural` renders; the motion families are the same.
"""

from dataclasses import replace

import numpy as np

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
        self.clip["vignette"] = rng.uniform(0, 0.35)
        self.clip["noise"] = rng.uniform(0, 0.03) if rng.random() < 0.6 else 0.0
        self.clip["tone"] = rng.uniform(0.8, 1.3)
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

    def plan(self):
        plan = super().plan()
        if self.shadow:
            plan.objects["shadow"] = 0.4, 1 / self.shadow
        if self.line:
            plan.objects["line"] = self.ink, self.line
        noise = None
        if self.clip["noise"]:
            noise = self.grain.standard_normal((3, self.frames, self.size, self.size), dtype=np.float32)
        return replace(plan, blur=self.blur, grain=noise)

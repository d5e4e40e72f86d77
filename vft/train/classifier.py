"""A small classifier of the motion in procedural clips: ``vft eval`` asks it what generated clips show."""

from __future__ import annotations

import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from . import procedural

SEED = 4_000_000
SIDE = 32
STEPS, BATCH, CLIPS = 900, 32, 5000


class Classifier(nn.Module):
    """Space-time convolutions over clips of 32 x 32 and their changes from frame to frame -> logits of the families.

    Motion is what changes, so that blur matters little; pixels beside it tell what moves.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [6, width, 2 * width, 4 * width, 4 * width]
        layers = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            stride = (1, 2, 2) if i < 1 else (2, 2, 2) if i < 3 else 1
            layers += [nn.Conv3d(a, b, 3, stride, 1, bias=False), nn.BatchNorm3d(b), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * sizes[-1], len(procedural.FAMILIES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[B, 6, T, 32, 32]`` as :func:`prepare` gives it -> ``[B, families]``."""
        h = self.features(x).flatten(2)
        return self.head(torch.cat([h.mean(2), h.amax(2)], 1))

    @torch.no_grad()
    def accuracy(self, clips: torch.Tensor, labels: torch.Tensor) -> float:
        """How often the likeliest family of ``[B, 3, T, H, W]`` in [-1, 1] is that of ``labels [B]``."""
        guesses = torch.cat([self(part).argmax(1) for part in prepare(clips).split(64)])
        return float((guesses == labels).float().mean())


def prepare(clips: torch.Tensor) -> torch.Tensor:
    """``[B, 3, T, H, W]`` in [-1, 1] -> ``[B, 6, T - 1, 32, 32]``: pixels, and ten times the change since the last."""
    small = F.adaptive_avg_pool3d(clips.clamp(-1, 1), (clips.shape[2], SIDE, SIDE))
    return torch.cat([small[:, :, 1:], 10 * small.diff(dim=2)], 1)


def train(size: int, frames: int, steps: int = STEPS, clips: int = CLIPS) -> Classifier:
    """Trains a classifier on ``clips`` procedural clips; the same arguments and threads give the same classifier."""
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model = Classifier()
    parts = [range(i, min(i + 50, clips)) for i in range(0, clips, 50)]
    hidden = not sys.stderr.isatty()
    data = torch.cat(
        [
            prepare(procedural.batch(SEED, part, size, frames, threads)).half()
            for part in tqdm(parts, desc="classifier's clips", leave=False, disable=hidden)
        ]
    )
    labels = torch.tensor([procedural.label(SEED, i) for i in range(clips)])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier", leave=False, disable=hidden):
        chosen = torch.randint(clips, (BATCH,), generator=generator)
        x, y = _mirrored(data[chosen].float(), generator), labels[chosen]
        loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _mirrored(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # no family has a direction
    axes = [axis for axis in (3, 4) if torch.rand((), generator=generator) < 0.5]
    x = x.flip(axes)
    return x.transpose(3, 4) if torch.rand((), generator=generator) < 0.5 else x

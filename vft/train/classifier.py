"""A small classifier of the motion in procedural clips, or of what words name in those of :mod:`vft.train.named`:
``vft eval`` asks it what generated clips show.

A tokenizer for short sequences keeps large things and where they go; detail and the motion between the frames of one
latent frame are the first to be lost. So the classifier looks at motion from one latent frame to the next, at a low
resolution, and has learned to do so through blur and noise. It has seen no tokenizer's output. It is shown where each
place went as a cost volume (as in FlowNet, arXiv 1504.06852): without, convolutions of this size hardly tell a pan from
things that move by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .. import progress
from ..words import COLOURS, MOTIONS, SHAPES
from . import named, procedural

SEED = 4_000_000
# pixels of a side, and frames of a clip that are averaged: those of one latent frame
SIDE, STRIDE = 16, 4
STEPS, BATCH, CLIPS = 2500, 64, 24000
# share of training batches that are left as they are; largest noise put on the others, of pixels in [-1, 1]
CLEAN, NOISE = 0.2, 0.3
# changes from frame to frame are smaller than pixels
CHANGE = 5.0
# pixels that a place may move from frame to frame, and channels that what is known of it becomes
REACH, MOVES = 3, 16


@dataclass(frozen=True)
class Subject:
    """What a classifier is asked about clips.

    questions: the answers that each has, by name; ``clip(seed, index, size, frames)`` uint8 ``[T, H, W, 3]`` and
    ``facts(seed, index)``, the right answers in that order; directed: whether a mirrored clip has other answers.
    """

    questions: dict[str, tuple[str, ...]]
    clip: Callable[..., torch.Tensor]
    facts: Callable[[int, int], tuple[str, ...]]
    directed: bool

    def clips(self, seed: int, indices, size: int, frames: int, threads: int = 1) -> torch.Tensor:
        """float32 ``[B, 3, T, H, W]`` in [-1, 1]."""
        return procedural.together(lambda i: self.clip(seed, i, size, frames), indices, size, frames, threads)

    def labels(self, seed: int, indices) -> torch.Tensor:
        """int64 ``[B, questions]``."""
        rows = [zip(self.questions.values(), self.facts(seed, i), strict=True) for i in indices]
        return torch.tensor([[answers.index(fact) for answers, fact in row] for row in rows])


def _motion(seed: int, index: int) -> tuple[str]:
    return (procedural.FAMILIES[procedural.label(seed, index)],)


MOTION = Subject({"motion": procedural.FAMILIES}, procedural.clip, _motion, False)
NAMED = Subject({"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS}, named.clip, named.facts, True)


class Classifier(nn.Module):
    """Space-time convolutions over what :func:`shrink` gives, its changes and moves from frame to frame -> logits of
    the answers to all questions of a subject."""

    def __init__(self, subject: Subject = MOTION, width: int = 32) -> None:
        super().__init__()
        self.sizes = [len(answers) for answers in subject.questions.values()]
        sizes = [6 + MOVES, width, 2 * width, 4 * width, 4 * width]
        self.moves = nn.Conv3d((2 * REACH + 1) ** 2, MOVES, 1)
        layers = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            stride = (1, 2, 2) if i in (1, 2) else 1
            layers += [nn.Conv3d(a, b, 3, stride, 1, bias=False), nn.BatchNorm3d(b), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * sizes[-1], sum(self.sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[B, 3, F, 16, 16]`` as :func:`shrink` gives it, F > 1 -> ``[B, answers of all questions]``."""
        x = torch.cat([x[:, :, 1:], CHANGE * x.diff(dim=2), self.moves(matches(x))], 1)
        h = self.features(x).flatten(2)
        return self.head(torch.cat([h.mean(2), h.amax(2)], 1))

    @torch.no_grad()
    def right(self, clips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """bool ``[B, questions]``: whether the likeliest answers about ``[B, 3, T, H, W]`` in [-1, 1] are those of
        ``labels [B, questions]``."""
        guesses = [
            torch.stack([logits.argmax(1) for logits in self(part).split(self.sizes, 1)], 1)
            for part in shrink(clips).split(64)
        ]
        return torch.cat(guesses) == labels

    def accuracy(self, clips: torch.Tensor, labels: torch.Tensor) -> float:
        """How often the only question is answered right; labels ``[B]``. Raises ValueError where there are more."""
        if len(self.sizes) != 1:
            raise ValueError(f"a classifier must have one question to have an accuracy, got {len(self.sizes)}")
        return float(self.right(clips, labels[:, None]).float().mean())


def shrink(clips: torch.Tensor) -> torch.Tensor:
    """``[B, 3, 1 + 4 k, H, W]`` in [-1, 1] -> ``[B, 3, 1 + k, 16, 16]``: the first frame, then means of four."""
    if clips.shape[2] % STRIDE != 1 or clips.shape[2] == 1:
        raise ValueError(f"clips must have 1 + {STRIDE} k frames, k > 0, got {clips.shape[2]}")
    small = F.adaptive_avg_pool3d(clips.clamp(-1, 1), (clips.shape[2], SIDE, SIDE))
    return torch.cat([small[:, :, :1], small[:, :, 1:].unflatten(2, (-1, STRIDE)).mean(3)], 2)


def matches(x: torch.Tensor) -> torch.Tensor:
    """How ill each place of a frame fits the places around it in the next: ``[B, 3, F, H, W] -> [B, n, F - 1, H, W]``,
    for n moves of up to ``REACH`` pixels along each axis, the log of the squared error of 3 x 3 pixels over its mean.
    """
    before, after = (part.transpose(1, 2).flatten(0, 1) for part in (x[:, :, :-1], x[:, :, 1:]))
    after = F.pad(after, (REACH,) * 4, mode="replicate")
    height, width = x.shape[3:]
    moves = [(dy, dx) for dy in range(2 * REACH + 1) for dx in range(2 * REACH + 1)]
    there = (after[:, :, dy : dy + height, dx : dx + width] for dy, dx in moves)
    error = torch.stack([(before - place).square().mean(1) for place in there], 1)
    # where nothing is to be seen, no move is better than another
    error = F.avg_pool2d(F.pad(error, (1,) * 4, mode="replicate"), 3, 1) + 1e-3
    return (error / error.mean(1, keepdim=True)).log().unflatten(0, (len(x), -1)).transpose(1, 2)


def train(size: int, frames: int, steps: int = STEPS, clips: int = CLIPS, subject: Subject = MOTION) -> Classifier:
    """Trains a classifier on ``clips`` clips; the same arguments and threads give the same classifier."""
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model = Classifier(subject)
    parts = [range(i, min(i + 50, clips)) for i in range(0, clips, 50)]
    data = torch.cat(
        [
            shrink(subject.clips(SEED, part, size, frames, threads)).half()
            for part in progress.bar(parts, desc="classifier's clips", unit="batch")
        ]
    )
    labels = subject.labels(SEED, range(clips))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in progress.bar(range(steps), desc="classifier", unit="step"):
        chosen = torch.randint(clips, (BATCH,), generator=generator)
        x, y = _degraded(data[chosen].float(), generator), labels[chosen]
        if not subject.directed:
            x = _mirrored(x, generator)
        answers = zip(model(x).split(model.sizes, 1), y.unbind(1), strict=True)
        losses = [F.cross_entropy(logits, wanted, label_smoothing=0.05) for logits, wanted in answers]
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _degraded(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # detail lost, and every frame wrong in its own way, as coarsely as the detail that is left
    if torch.rand((), generator=generator) < CLEAN:
        return x
    count, _, frames = x.shape[:3]
    side = int(torch.randint(SIDE // 4, SIDE, (), generator=generator))
    x = F.interpolate(F.adaptive_avg_pool3d(x, (frames, side, side)), x.shape[2:], mode="trilinear")
    amount = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    noise = amount * torch.randn(count, 3 * frames, side, side, generator=generator)
    return x + F.interpolate(noise, x.shape[3:], mode="bilinear").view_as(x)


def _mirrored(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    axes = [axis for axis in (3, 4) if torch.rand((), generator=generator) < 0.5]
    x = x.flip(axes)
    return x.transpose(3, 4) if torch.rand((), generator=generator) < 0.5 else x

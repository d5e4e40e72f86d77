"""A causal video codec in bounded memory: pictures in tiles, time in pieces, and the bytes that both take.

A network is a list of stages, the layers of one resolution each. A tile of the result needs a window of every stage:
what each output sees to its sides is computed with it and cut away before the next stage, so that windows grow towards
the stages of few pixels. At the border of a picture a window ends there, and the zeros beyond are the network's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import nn

from .convolution import Convolution, convolutions, native

# scores of attention that are in memory at a time
SCORES = 1 << 26
# sides of a tile in latents; of 8 three quarters and more of the work is its surroundings
SMALLEST = 8


@dataclass(frozen=True)
class Stage:
    """Layers that keep height and width, and the resampling behind them, which halves or doubles both."""

    layers: list[Callable]
    resample: Convolution | None = None


class Window(NamedTuple):
    """Of one axis of a stage: pixels that are computed, and those among them that go on."""

    size: int
    keep: slice


class Tile(NamedTuple):
    """Where a tile is taken from and put in [B, T, H, W, C], and (rows, columns) of each stage between."""

    source: tuple[slice, ...]
    target: tuple[slice, ...]
    windows: list[tuple[Window, Window]]


@dataclass(frozen=True)
class Plan:
    """latent_frames: how many are computed at a time, tile: its side in latents, None is all; bytes: at the peak, None
    where nobody asked."""

    latent_frames: int | None
    tile: int | None
    bytes: int | None = None


def run(stages: Sequence[Stage], x: torch.Tensor, state=None, tile: Tile | None = None) -> torch.Tensor:
    """The stages on x [B, T, H, W, C], a whole picture or the source of a tile."""
    for i, stage in enumerate(stages):
        for layer in stage.layers:
            x = layer(x, state=state)
        if tile is not None:
            rows, columns = (window.keep for window in tile.windows[i])
            # a copy, so that what is cut away is not kept
            x = x[:, :, rows, columns].contiguous()
        if stage.resample is not None:
            x = stage.resample(x, state=state)
    return x


def tiles(stages: Sequence[Stage], height: int, width: int, side: int | None, up: bool) -> list[Tile]:
    """Tiles of at most side x side latents that make up height x width latents; None: one.

    up: whether latents go in and pixels come out.
    """
    axes = []
    scale = 2 ** (len(stages) - 1)
    for size in (height, width):
        count = 1 if side is None else -(-size // side)
        # of even sizes
        cuts = [size * i // count for i in range(count + 1)]
        axes.append([_axis(stages, size, part, up, scale) for part in pairwise(cuts)])
    every = slice(None)
    return [
        Tile((every, every, y[0], x[0]), (every, every, y[1], x[1]), list(zip(y[2], x[2], strict=True)))
        for y, x in product(*axes)
    ]


def _axis(stages, latents: int, part: tuple[int, int], up: bool, scale: int) -> tuple[slice, slice, list[Window]]:
    size, keep = (latents * scale, (part[0] * scale, part[1] * scale)) if up else (latents, part)
    target, windows = slice(*keep), []
    for i in reversed(range(len(stages))):
        seen = reach(stages[i])
        region = max(0, keep[0] - seen), min(size, keep[1] + seen)
        before = region
        if i and up:
            # output pixel o sees the inputs of o - 1 to o + 1
            size //= 2
            before = max(0, (region[0] - 1) // 2), min(size, region[1] // 2 + 1)
            region = 2 * before[0], 2 * before[1]
        elif i:
            # output pixel o sees inputs 2 o to 2 o + 2
            size *= 2
            before = 2 * region[0], min(size, 2 * region[1] + 2)
            region = before[0] // 2, before[1] // 2
        windows.append(Window(region[1] - region[0], slice(keep[0] - region[0], keep[1] - region[0])))
        keep = before
    return slice(*keep), target, windows[::-1]


def reach(stage: Stage) -> int:
    """How many pixels to its sides an output of the stage's layers sees."""
    return sum(_kernel(conv)[0] // 2 for layer in stage.layers for conv in _convolutions(layer))


def choose(memory: int, fixed: int, size: tuple[int, int, int], count: Callable[[int | None, int | None], int]) -> Plan:
    """The plan of the least work: all at once, else fewer latent frames at a time, which repeats nothing, else one
    frame and the largest tile.

    fixed: bytes that any plan takes; count: those that latent_frames and tile take beyond them; size: latent frames,
    height and width. Raises ValueError where the smallest tile takes more than ``memory``.
    """
    frames, largest = size[0], max(size[1:])
    pairs = [(n, None) for n in (None, *range(frames - 1, 0, -1))]
    pairs += [(1, side) for side in range(largest - 1, min(SMALLEST, largest) - 1, -1)]
    for pair in pairs:
        needed = fixed + count(*pair)
        if needed <= memory:
            return Plan(*pair, needed)
    least, latents = f"{-(-needed // 2**20)}M", " x ".join(map(str, size))
    raise ValueError(f"memory must be at least {least} for latents of {latents}, got {memory / 2**20:.4g}M")


def encode_bytes(network, batch: int, size: tuple[int, int, int], weight: torch.Tensor, frames, tile) -> int:
    """What encoding takes at its peak, one sample at a time, beyond the weights and what they are prepared to.

    network: with ``stages()``, ``whole()`` and ``width``; size: latent frames, height and width; weight: one of its
    weights; frames and tile as of a :class:`Plan`.
    """
    latents, area = size[0] * size[1] * size[2], 64 * size[1] * size[2]
    video, moments = 3 * (4 * size[0] - 3) * area, batch * latents * _outputs(network.conv_out)
    largest = max(
        _tiled_values(network.stages(), size, weight, frames, tile, up=False),
        _whole_values(network.whole(), network.width, size, weight, frames),
    )
    return weight.element_size() * (video + moments + network.width * latents + largest)


def decode_bytes(network, batch: int, size: tuple[int, int, int], weight: torch.Tensor, frames, tile) -> int:
    """The same of decoding."""
    latents, area = size[0] * size[1] * size[2], 64 * size[1] * size[2]
    channels = _inner(network.conv_in).in_channels
    largest = max(
        _tiled_values(network.stages(), size, weight, frames, tile, up=True),
        _whole_values(network.whole(), channels, size, weight, frames),
    )
    video = 4 * batch * 3 * (4 * size[0] - 3) * area
    return video + weight.element_size() * ((channels + network.width) * latents + largest)


def _tiled_values(stages: Sequence[Stage], size, weight: torch.Tensor, frames, tile, up: bool) -> int:
    """Numbers in memory while the largest tile is computed."""
    first, channels = stages[0].layers[0], 3
    if up:
        channels = _inner(_convolutions(first)[0]).in_channels
    count = (frames or size[0]) * (1 if up else 4)
    values = stage_values(stages, count, channels, weight, kept=frames is not None)

    def of(part: Tile) -> int:
        areas = [rows.size * columns.size for rows, columns in part.windows]
        # what goes in stays until the end
        peak = channels * count * areas[0] + max(area * value for area, (value, _) in zip(areas, values, strict=True))
        return peak + sum(area * held for area, (_, held) in zip(areas, values, strict=True))

    return max(map(of, tiles(stages, *size[1:], tile, up)))


def _whole_values(layers: list, channels: int, size, weight: torch.Tensor, frames) -> int:
    """Numbers in memory while the layers that see whole frames are computed."""
    count, area = frames or size[0], size[1] * size[2]
    ((peak, held),) = stage_values([Stage(layers)], count, channels, weight, kept=frames is not None)
    # on a GPU, scores of attention and their softmax in float32
    scores = 8 * min(SCORES, count * area**2) // weight.element_size() if weight.is_cuda else 0
    return area * (peak + held) + scores


def stage_values(
    stages: Sequence[Stage], frames: int, channels: int, weight: torch.Tensor, kept: bool
) -> list[tuple[int, int]]:
    """Of each stage, numbers a computed pixel: at the peak, and those that a state keeps to the next piece.

    frames, channels: of what goes in. weight: tells device and dtype. kept: whether there is a state.
    """
    found, ours = [], native(weight)
    # PyTorch lays every output's inputs side by side where the CPU has no instructions for a convolution
    columns = not ours and weight.device.type == "cpu"
    for stage in stages:
        peak, held = channels * frames, 0
        for layer in stage.layers:
            seen = _convolutions(layer)
            before = channels * frames
            for conv in seen:
                held += kept * _held(conv) * _inner(conv).in_channels
                if columns:
                    peak = max(peak, (3 + _inner(conv).weight[0].numel()) * (frames + 2))
            if not seen:
                # attention: its input, q, k, v and rows of two kinds; or a norm
                peak = max(peak, before * (6 if isinstance(layer, nn.Module) else 2 if ours else 3))
                continue
            frames = _frames(seen[0], frames)
            channels = _outputs(seen[-1])
            after = channels * frames
            if len(seen) == 1:
                # PyTorch pads time, and puts phases in order
                peak = max(peak, before + after if ours else 2 * (before + after))
            else:
                # a residual block: its input; the first convolution's result and that one's norm; the shortcut; the sum
                peak = max(peak, before + (3 + (before != after) if ours else 5) * after)
        if stage.resample is not None:
            # four pixels come of each, or one of four
            grown = 4 if stage.resample.options.get("upsample") else 0.25
            after = int(grown * _outputs(stage.resample) * frames)
            peak = max(peak, channels * frames + (after if ours else 2 * after))
        found.append((peak, held))
    return found


def _convolutions(layer) -> list[Convolution]:
    """Those of a layer that see neighbours, in the order of their computation; none of a norm or of attention."""
    found = convolutions(layer) if isinstance(layer, nn.Module) else []
    return [conv for conv in found if max(_inner(conv).kernel_size) > 1]


def _inner(conv: Convolution):
    return next(m for m in conv.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))


def _kernel(conv: Convolution) -> tuple[int, int]:
    """Taps in space and in time."""
    inner = _inner(conv)
    time = 1 if isinstance(inner, nn.Conv2d) else inner.kernel_size[0]
    return (1 if isinstance(inner, nn.Conv1d) else inner.kernel_size[-1]), time


def _held(conv: Convolution) -> int:
    """Frames that a state keeps."""
    return _kernel(conv)[1] - conv.options.get("time_stride", 1) * conv.options.get("phases", 1)


def _frames(conv: Convolution, frames: int) -> int:
    return frames * conv.options.get("phases", 1) // conv.options.get("time_stride", 1)


def _outputs(conv: Convolution) -> int:
    return _inner(conv).out_channels

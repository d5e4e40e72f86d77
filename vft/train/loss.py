"""The tokenizer's training loss: rectified flow with nested dropout (VideoFlexTok, arXiv 2604.12887).

x_t = (1 - t) clean + t noise,  loss = |v(x_t, t, codes of the first k registers) - (noise - clean)|^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import flexkernels
from flexkernels.upload import upload

from ..tokenizer import Tokenizer

# largest noise level put on conditioning frames, so that the decoder forgives its own small errors there
PREFIX_NOISE = 0.02
# the outermost levels begin near |z| = 1.3
VALUE_RANGE, RANGE_WEIGHT = 1.5, 0.1


@dataclass(frozen=True)
class Draw:
    """The random choices of a batch: ``t [B]``, noise like each sample's latents, and one int or bool a sample.

    replaced: (bool ``[sum T*N]``: which registers' codes the decoder sees replaced, int64 ids in their place), or None.
    """

    t: torch.Tensor
    noise: list[torch.Tensor]
    keep: list[int]
    prefix_frames: list[int]
    null: list[bool]
    prefix_t: torch.Tensor
    replaced: tuple[torch.Tensor, torch.Tensor] | None = None


def draw(
    latents: Sequence[torch.Tensor],
    registers: int,
    generator: torch.Generator,
    *,
    time_mean: float = 1.0,
    time_std: float = 1.2,
    noise_probability: float = 0.5,
    uniform_probability: float = 0.15,
    full_probability: float = 0.25,
    null_probability: float = 0.1,
    early_probability: float = 0.0,
    prefix_probability: float = 0.25,
    corruption: float = 0.0,
    codebook: int = 1,
    batch: int | None = None,
    first: int = 0,
) -> Draw:
    """t = sigmoid(normal(time_mean, time_std)), above 0.5 on average: the codes matter most where noise is strong; with
    ``noise_probability`` t = 1, where sampling begins, and with ``uniform_probability`` any t, so that none is new to
    the sampler; all registers kept with ``full_probability``, else k uniform over 1..N for half of the samples and over
    the powers of two for the others, and with ``early_probability`` in place of all that k with density 1 / k, so that
    the first registers are asked for most; the null condition and one conditioning frame with the given probabilities;
    registers replaced by random ids of the codebook with probability ``corruption``.

    latents ``[C, T, H, W]`` are samples ``first, first + 1, ...`` of a batch of ``batch`` (by default all of it): what
    is drawn for a sample depends on its place in the batch, not on which others are here.
    """
    batch, part = batch or len(latents), slice(first, first + len(latents))
    uniform = torch.randint(1, registers + 1, (batch,), generator=generator)
    powers = (2 ** torch.randint(0, registers.bit_length(), (batch,), generator=generator)).clamp(max=registers)
    pick = torch.rand(batch, generator=generator) < 0.5
    chance = torch.rand(5, batch, generator=generator)[:, part]
    # at 0 nothing is drawn, so that older runs repeat
    early = torch.rand(2, batch, generator=generator) if early_probability > 0 else torch.ones(2, batch)
    density = ((registers + 1) ** early[1]).long().clamp(max=registers)
    few = torch.where(early[0] < early_probability, density, torch.where(pick, uniform, powers))
    t = torch.sigmoid(time_mean + time_std * torch.randn(batch, generator=generator))
    prefix_t = PREFIX_NOISE * torch.rand(batch, generator=generator)
    seeds = torch.randint(2**62, (batch,), generator=generator)[part].tolist()
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(x.shape, generator=g) for x, g in zip(latents, own, strict=True)]
    counts = [x.shape[1] * registers for x in latents]
    replaced = _replaced(counts, corruption, codebook, own) if corruption > 0 else ()
    t = _times(t[part], chance[2], chance[3], noise_probability, uniform_probability)
    t, prefix_t, *rest = upload([t, prefix_t[part], *noise, *replaced], latents[0].device)
    return Draw(
        t=t,
        noise=rest[: len(latents)],
        keep=torch.where(chance[4] < full_probability, registers, few[part]).tolist(),
        prefix_frames=[int(c < prefix_probability and x.shape[1] > 1) for c, x in zip(chance[0], latents, strict=True)],
        null=(chance[1] < null_probability).tolist(),
        prefix_t=prefix_t,
        replaced=tuple(rest[len(latents) :]) or None,
    )


def _times(t, chance, uniform, noise_probability: float, uniform_probability: float) -> torch.Tensor:
    t = torch.where(chance < noise_probability + uniform_probability, uniform, t)
    return torch.where(chance < noise_probability, 1.0, t)


def _replaced(counts: list[int], corruption: float, codebook: int, generators) -> tuple[torch.Tensor, torch.Tensor]:
    hit = torch.cat([torch.rand(n, generator=g) < corruption for n, g in zip(counts, generators, strict=True)])
    ids = torch.cat([torch.randint(codebook, (n,), generator=g) for n, g in zip(counts, generators, strict=True)])
    return hit, ids


def flow_loss(
    model: Tokenizer,
    latents: Sequence[torch.Tensor],
    choices: Draw,
    weigh: Callable[[int], torch.Tensor | None] = lambda frames: None,
    edges: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The mean over samples of each one's mean squared velocity error, conditioning frames left out, and range penalty.
    With ``edges`` also what it makes of the velocity's errors ``[B, C, T, H, W]``, see :func:`edge_error`.

    latents: one ``[C, T, H, W]`` a sample, of any shapes, in one packed batch. The loss of a batch is the mean of those
    of equal parts of it. ``weigh(T)`` gives what squared errors of T latent frames count, ``[C, T, 1, 1]``, or None.
    """
    levels = model.config.levels
    values = model.encoder(list(latents))
    codes, _ = flexkernels.fsq_quantize(values, levels, ids=False)
    if choices.replaced is not None:
        hit, ids = choices.replaced
        codes = torch.where(hit[:, None], flexkernels.fsq_dequantize(ids, levels, dtype=codes.dtype), codes)
    groups, times, noised = _alike(latents, choices.prefix_frames), (choices.t.unbind(), choices.prefix_t.unbind()), {}
    for samples, frames in groups:
        t, prefix_t, clean, noise = (_stack(x, samples) for x in (*times, latents, choices.noise))
        t = torch.cat([prefix_t[:, None].expand(-1, frames), t[:, None].expand(-1, clean.shape[2] - frames)], 1)
        t = t[:, None, :, None, None]
        noised.update(zip(samples, ((1 - t) * clean + t * noise).unbind(), strict=True))
    noised = [noised[i] for i in range(len(latents))]
    velocity = model.decoder(noised, choices.t, codes, choices.keep, choices.prefix_frames, choices.null)
    beyond = (values.abs() - VALUE_RANGE).clamp(min=0).square().split([x.shape[1] * model.registers for x in latents])
    each = []
    for samples, frames in groups:
        v, noise, clean = (_stack(x, samples) for x in (velocity, choices.noise, latents))
        difference = v - (noise - clean)
        weight = weigh(difference.shape[2])
        square = difference.square() if weight is None else difference.square() * weight
        each.append(square[:, :, frames:].mean((1, 2, 3, 4)))
        if edges is not None:
            each[-1] = each[-1] + edges(F.pad(difference[:, :, frames:], (0, 0, 0, 0, frames, 0)))
        each[-1] = each[-1] + RANGE_WEIGHT * _stack(beyond, samples).mean((1, 2))
    return torch.cat(each).mean()


def edge_error(codec, difference: torch.Tensor) -> torch.Tensor:
    """Mean squared step between neighbouring pixels, in both directions, of the pictures that a linear codec makes of
    differences of latents ``[B, C, T, H, W]``: ``[B]``.

    A quadratic form of the difference: the best velocity stays the mean, and errors of fine structure count more.
    """
    pictures = codec.render(torch.cat([difference.float(), torch.zeros_like(difference[:1], dtype=torch.float32)]))
    steps = [(pictures[:-1] - pictures[-1]).diff(dim=axis) for axis in (-1, -2)]
    return sum(step.square().mean((1, 2, 3, 4)) for step in steps)


def _stack(tensors: Sequence[torch.Tensor], samples: list[int]) -> torch.Tensor:
    return torch.stack([tensors[i] for i in samples])


def _alike(latents: Sequence[torch.Tensor], prefix_frames: Sequence[int]) -> list[tuple[list[int], int]]:
    """The samples of each shape and number of conditioning frames, and that number."""
    groups: dict = {}
    for i, (x, frames) in enumerate(zip(latents, prefix_frames, strict=True)):
        groups.setdefault((x.shape, frames), []).append(i)
    return [(samples, frames) for (_, frames), samples in groups.items()]

"""The tokenizer's training loss: rectified flow with nested dropout (VideoFlexTok, arXiv 2604.12887).

x_t = (1 - t) clean + t noise,  loss = |v(x_t, t, codes of the first k registers) - (noise - clean)|^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import flexkernels

from ..tokenizer import Tokenizer

# largest noise level put on conditioning frames, so that the decoder forgives its own small errors there
PREFIX_NOISE = 0.02
# the outermost levels begin near |z| = 1.3
VALUE_RANGE, RANGE_WEIGHT = 1.5, 0.1


@dataclass(frozen=True)
class Draw:
    """The random choices of one batch: ``t [B]``, ``noise`` like the latents, and one int or bool a sample."""

    t: torch.Tensor
    noise: torch.Tensor
    keep: list[int]
    prefix_frames: list[int]
    null: list[bool]
    prefix_t: torch.Tensor


def draw(
    latents: torch.Tensor,
    registers: int,
    generator: torch.Generator,
    *,
    time_mean: float = 1.0,
    time_std: float = 1.2,
    noise_probability: float = 0.25,
    null_probability: float = 0.1,
    prefix_probability: float = 0.25,
) -> Draw:
    """t = sigmoid(normal(time_mean, time_std)), above 0.5 on average: the codes matter most where noise is strong; with
    ``noise_probability`` t = 1, where sampling begins; k uniform over 1..N for half of the samples and over the powers
    of two for the others; the null condition and one conditioning frame with the given probabilities."""
    batch = len(latents)
    uniform = torch.randint(1, registers + 1, (batch,), generator=generator)
    powers = 2 ** torch.randint(0, registers.bit_length(), (batch,), generator=generator)
    pick = torch.rand(batch, generator=generator) < 0.5
    chance = torch.rand(3, batch, generator=generator)
    t = torch.sigmoid(time_mean + time_std * torch.randn(batch, generator=generator))
    return Draw(
        t=torch.where(chance[2] < noise_probability, 1.0, t),
        noise=torch.randn(latents.shape, generator=generator),
        keep=torch.where(pick, uniform, powers.clamp(max=registers)).tolist(),
        prefix_frames=(chance[0] < prefix_probability).int().tolist() if latents.shape[2] > 1 else [0] * batch,
        null=(chance[1] < null_probability).tolist(),
        prefix_t=PREFIX_NOISE * torch.rand(batch, generator=generator),
    )


def flow_loss(
    model: Tokenizer, latents: torch.Tensor, choices: Draw, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared velocity error of latents ``[B, C, T, H, W]``, conditioning frames left out, and range penalty.

    ``weight``, which broadcasts against the latents, weighs the squared errors.
    """
    values = model.encoder(list(latents))
    codes, _ = flexkernels.fsq_quantize(values, model.config.levels, ids=False)
    t = _frame_times(choices, latents)
    x = (1 - t) * latents + t * choices.noise
    velocity = model.decoder(list(x), choices.t, codes, choices.keep, choices.prefix_frames, choices.null)
    error = (torch.stack(velocity) - (choices.noise - latents)).square()
    error = error if weight is None else error * weight
    counted = _counted(choices, latents)
    beyond = (values.abs() - VALUE_RANGE).clamp(min=0).square().mean()
    return (error * counted).sum() / (counted.sum() * latents[0, :, 0].numel()) + RANGE_WEIGHT * beyond


def _frame_index(latents: torch.Tensor) -> torch.Tensor:
    return torch.arange(latents.shape[2]).view(1, 1, -1, 1, 1)


def _counted(choices: Draw, latents: torch.Tensor) -> torch.Tensor:
    # [B, 1, T, 1, 1], 1 where the frame is generated
    return (_frame_index(latents) >= _column(choices.prefix_frames)).float()


def _frame_times(choices: Draw, latents: torch.Tensor) -> torch.Tensor:
    # [B, 1, T, 1, 1]: t, and nearly 0 on conditioning frames
    generated = _counted(choices, latents).bool()
    return torch.where(generated, _column(choices.t), _column(choices.prefix_t))


def _column(values) -> torch.Tensor:
    return torch.as_tensor(values).view(-1, 1, 1, 1, 1)

"""How many registers a video needs: chosen by what decoding at k gives, or by a regression that predicts it.

A curve is the mean squared error of a video at k = 1, 2, 3, 4, 6, 8, ..., N registers of each latent frame; between
these it is interpolated in log k and log error. Errors are those of decoding chunks by themselves in few solver steps
without guidance, so the PSNR of a guided sampler, which draws detail in place of the mean, lies below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from .checkpoint import write_tensors
from .stills import hold, join_ids, repeats, still_groups
from .video import preprocess

# solver steps of a look, where the model itself takes more
STEPS = 2
# sizes at which a predictor looks at frames, each half of the one before
OCTAVES = 6
RIDGE = 1e-3
# below any error of decoding; a still black video has none
FLOOR = 1e-6


def probes(registers: int) -> list[int]:
    """The numbers of registers that are looked at: 1, 2, 3, 4, 6, 8, 12, ... and all."""
    octaves = [2**i for i in range(registers.bit_length())]
    return sorted({n for n in (*octaves, *(3 * i // 2 for i in octaves[1:])) if n <= registers} | {registers})


@torch.no_grad()
def decoded_errors(tokenizer, chunks: Sequence[torch.Tensor], ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 ``[chunks, probes]``: the mean squared error, of pixels in [-1, 1], of each chunk decoded from its first
    registers, all of one chunk in one packed call. ``chunks`` and ``ids`` as of :meth:`vft.Tokenizer.encode_chunks`.
    """
    rows, stride = [], tokenizer.codec.temporal_stride
    for chunk, i in zip(chunks, ids, strict=True):
        keeps = probes(tokenizer.registers)
        # as in a video: what stands still repeats its ids
        i = join_ids([i], [still_groups(chunk, stride)])
        same = repeats(i).tolist()
        source = _pixels(chunk, tokenizer.size)[None].to(tokenizer.device)
        shape = tokenizer.codec.latent_shape(*source.shape[2:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tokenizer.device)
        latents = tokenizer.decode_latents(
            [i] * len(keeps), keeps, min(tokenizer.steps, STEPS), None, noise=[noise] * len(keeps)
        )
        videos = [hold(tokenizer.codec.decode(z[None]).clamp(-1, 1), same, stride) for z in latents]
        rows.append(torch.stack([(video - source).square().mean() for video in videos]).double().cpu())
    return torch.stack(rows)


def _pixels(chunk: torch.Tensor, size: int | None) -> torch.Tensor:
    # uint8 [t, H, W, 3] or float [t, 3, H, W] -> float [3, t, H, W]
    return chunk.transpose(0, 1).float() if chunk.is_floating_point() else preprocess(chunk, size)


def _frames(chunk: torch.Tensor, size: int | None) -> torch.Tensor:
    # -> float [t, 3, H, W]; frames of the working size need no more than their type
    if not chunk.is_floating_point() and chunk.shape[1] == chunk.shape[2] == size:
        return chunk.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return _pixels(chunk, size).transpose(0, 1)


def features(chunk: torch.Tensor, ids: torch.Tensor, levels: Sequence[int], size: int | None) -> torch.Tensor:
    """float64 ``[n]`` of one chunk: logarithms of what frames lose when they are halved again and again and of their
    changes in time at each size, and the spread of each code."""
    frames = _frames(chunk, size)
    found, scale = [], frames.square().mean()
    for _ in range(OCTAVES):
        changes = frames.diff(dim=0).square().mean() if len(frames) > 1 else frames.new_zeros(())
        found += [scale - frames.square().mean(), changes]
        if min(frames.shape[2:]) > 1:
            frames = F.avg_pool2d(frames, 2)
    # the first is 0 by definition
    logs = (torch.stack(found[1:]).double().clamp(min=0) + FLOOR).log()
    codes = torch.stack([ids // b % n for b, n in zip(_basis(levels), levels, strict=True)], -1).double()
    spread = codes.flatten(0, 1).std(0, correction=0) / torch.tensor(levels)
    return torch.cat([logs, spread])


def _basis(levels: Sequence[int]) -> list[int]:
    basis = [1]
    for level in levels[:-1]:
        basis.append(basis[-1] * level)
    return basis


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predicts a curve from :func:`features`: log error = [1, x, x^2] weights, x standardised by ``mean`` and ``std``.

    Made by ``vft train budget``. ``fingerprint`` is that of the tokenizer, the only one that it is for.
    """

    mean: torch.Tensor
    std: torch.Tensor
    weights: torch.Tensor
    fingerprint: str

    @classmethod
    def fit(cls, features: torch.Tensor, errors: torch.Tensor, fingerprint: str) -> Predictor:
        """Ridge regression on features ``[chunks, n]`` and errors ``[chunks, probes]``.

        Raises ValueError for no more chunks than unknowns.
        """
        if len(features) <= 2 * features.shape[1]:
            raise ValueError(f"chunks must be more than {2 * features.shape[1]}, got {len(features)}")
        mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
        x = _expanded((features - mean) / std)
        gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        return cls(mean, std, torch.linalg.solve(gram, x.T @ (errors + FLOOR).log()).contiguous(), fingerprint)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """features ``[chunks, n]`` -> errors ``[chunks, probes]``."""
        return (_expanded(((features - self.mean) / self.std).clamp(-4, 4)) @ self.weights).exp()

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file. Raises OSError where it cannot be written."""
        tensors = {"mean": self.mean, "std": self.std, "weights": self.weights}
        write_tensors(path, tensors, {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Predictor:
        """Reads what :meth:`save` wrote. Raises ValueError for another file, OSError where there is none."""
        if not Path(path).is_file():
            raise OSError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(name) for name in ("mean", "std", "weights")]
                return cls(*tensors, json.loads(file.metadata()["fingerprint"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a predictor that vft train budget has made: {error}") from error


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x, x.square()], 1)


class Curves:
    """Adds up the curve of one video, chunk by chunk; give :meth:`add` to the encoder.

    ``predictor``: None looks at what decoding gives.
    """

    def __init__(self, tokenizer, predictor: Predictor | None = None) -> None:
        if predictor is not None and predictor.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"predictor must be that of {tokenizer.name!r} (fingerprint {tokenizer.fingerprint}), got one of "
                f"{predictor.fingerprint}"
            )
        self.tokenizer, self.predictor = tokenizer, predictor
        self.sum, self.frames = torch.zeros(len(probes(tokenizer.registers)), dtype=torch.float64), 0

    def add(self, chunks: Sequence[torch.Tensor], ids: Sequence[torch.Tensor]) -> None:
        """Chunks as they were encoded, and their ids."""
        if self.predictor is None:
            errors = decoded_errors(self.tokenizer, chunks, ids)
        else:
            levels, size = self.tokenizer.config.levels, self.tokenizer.size
            errors = self.predictor(
                torch.stack([features(c, i, levels, size) for c, i in zip(chunks, ids, strict=True)])
            )
        lengths = torch.tensor([len(chunk) for chunk in chunks], dtype=torch.float64)
        self.sum += lengths @ errors
        self.frames += int(lengths.sum())

    def psnr(self) -> torch.Tensor:
        """float64 ``[N]``: dB at k = 1..N, where more registers are never worse."""
        errors = (self.sum / self.frames).clamp(min=FLOOR).cummin(0).values
        return interpolated(10 * (4 / errors).log10(), self.tokenizer.registers)


def interpolated(values: torch.Tensor, registers: int) -> torch.Tensor:
    """Values ``[probes]`` at the probes -> ``[registers]`` at 1, 2, ..., linear in log k."""
    at, known = torch.arange(1, registers + 1).double().log2(), torch.tensor(probes(registers)).double().log2()
    if len(known) == 1:
        return values
    right = torch.searchsorted(known, at).clamp(1, len(known) - 1)
    share = (at - known[right - 1]) / (known[right] - known[right - 1])
    return values[right - 1].lerp(values[right], share)


def choose(
    curves: Sequence[torch.Tensor], latent_frames: Sequence[int], target: float | None, budget: int | None
) -> list[int]:
    """k of each video: the fewest registers that reach ``target`` dB (all where none do), and those with the best mean
    PSNR that together take at most ``budget`` tokens.

    curves: ``[N]`` dB at k = 1..N of each video.

    Raises ValueError for a budget below one token a latent frame.
    """
    tokens = torch.tensor(latent_frames, dtype=torch.float64)[:, None]
    quality = torch.stack(list(curves))
    if target is not None:
        # beyond the target, more is worth nothing
        quality = quality.clamp(max=target)
    if budget is None:
        return [int(k) + 1 for k in quality.argmax(1)]
    if budget < tokens.sum():
        raise ValueError(f"budget must be at least one token a latent frame, {int(tokens.sum())}, got {budget}")
    count = torch.arange(1, quality.shape[1] + 1).double()
    # Lagrange: each video takes the k of the best dB - price * tokens; the least price that keeps to the budget
    low, high = 0.0, 1e3
    k = torch.zeros(len(quality), dtype=torch.int64)
    for _ in range(60):
        price = (low + high) / 2
        taken = (quality - price * tokens * count).argmax(1)
        if (tokens[:, 0] * count[taken]).sum() <= budget:
            high, k = price, taken
        else:
            low = price
    return [int(n) + 1 for n in _spent(k, quality, tokens[:, 0], budget)]


def _spent(k: torch.Tensor, quality: torch.Tensor, tokens: torch.Tensor, budget: int) -> torch.Tensor:
    """What a price leaves over goes to whom it helps most, register by register."""
    k = k.clone()
    videos = torch.arange(len(k))
    while True:
        left = budget - float((tokens * (k + 1)).sum())
        after = (k + 1).clamp(max=quality.shape[1] - 1)
        gain = (quality[videos, after] - quality[videos, k]) / tokens
        gain[(tokens > left) | (after == k)] = 0
        best = int(gain.argmax())
        if gain[best] <= 0:
            return k
        k[best] += 1

"""What new registers are to say before they are trained to say it well: linear codes of one patch each.

More registers are of use once the encoder puts something new into them and the decoder listens, and each waits for the
other. Here the first half is solved for: every group of new registers, one a patch, gets a linear map from the latents
of its patch, at its frame and the frame before, to its values. The maps are fitted together with a linear decoder that
sees the known registers' reconstruction, through the quantiser, so that they say what that lacks, most important group
first. The encoder then learns these values as it would any regression (``vft train tokenizer --teach``).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

import flexkernels

from ..layers import grids_of, patchify
from ..tokenizer import Tokenizer
from . import initial
from .loss import RANGE_WEIGHT, VALUE_RANGE

# of the fit: patches through time of a step, steps and Adam's largest learning rate, and how many frames back the
# linear decoder looks
BATCH, STEPS, RATE, BACK = 1024, 600, 3e-3, 3
# standard deviations of the components that the fit starts from, once they are values: over all levels
START_STD = 0.9


class PatchCodes(nn.Module):
    """Linear codes of patches in time: ``[..., T, D] -> [..., T, n]``, of a frame and the one before it.

    A first frame, which has none before it, has a map of its own.
    """

    def __init__(self, size: int, values: int) -> None:
        super().__init__()
        self.first, self.later = nn.Linear(size, values), nn.Linear(2 * size, values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.cat([x[..., 1:, :], x[..., :-1, :]], -1)
        return torch.cat([self.first(x[..., :1, :]), self.later(pairs)], -2)

    @torch.no_grad()
    def start(self, x: torch.Tensor, error: torch.Tensor) -> list[torch.Tensor]:
        """Begins with the principal components of what the known registers miss of ``x [samples, T, D]``; returns what
        a code of 1 adds to a patch, ``[n, D]``, of first and later frames."""
        pictures = []
        for linear, part in ((self.first, slice(0, 1)), (self.later, slice(1, None))):
            size, values = x.shape[2], linear.out_features
            flat, missed = (y[:, part].reshape(-1, size) for y in (x, error))
            linear.weight.zero_(), linear.bias.zero_()
            if len(flat) == 0:
                pictures.append(flat.new_zeros(values, size))
                continue
            vectors = torch.linalg.eigh((missed.T @ missed).double())[1].flip(1)[:, :values].T.to(x)
            scale = START_STD / (flat @ vectors.T).std(0).clamp(min=1e-6)
            linear.weight[: len(vectors), :size] = scale[:, None] * vectors
            linear.bias.copy_(-linear.weight[:, :size] @ flat.mean(0))
            picture = linear.weight.new_zeros(values, size)
            picture[: len(vectors)] = vectors * (missed @ vectors.T).std(0)[:, None]
            pictures.append(picture)
        return pictures


class _LinearDecoder(nn.Module):
    """Patches from the known registers' reconstruction ``[samples, T, D]`` and codes ``[samples, T, n]``: linear in
    both, at a frame and some before it."""

    def __init__(self, frames: int, pictures: list[torch.Tensor]) -> None:
        super().__init__()
        values, size = pictures[0].shape
        self.known = nn.Parameter(0.9 * torch.eye(size).repeat(frames, 1, 1))
        self.before = nn.Parameter(torch.zeros(frames, size, size))
        self.bias = nn.Parameter(torch.zeros(frames, size))
        # codes of the first frame in frame f; codes of later ones, by how far back they are
        self.first = nn.Parameter(torch.zeros(frames, values, size))
        self.later = nn.Parameter(torch.zeros(1 + BACK, values, size))
        with torch.no_grad():
            self.first[0], self.later[0] = pictures[0], pictures[1]

    def forward(self, codes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        frames = []
        for f in range(codes.shape[1]):
            out = self.bias[f] + known[:, f] @ self.known[f] + codes[:, 0] @ self.first[f]
            if f:
                out = out + known[:, f - 1] @ self.before[f]
            for back in range(min(f, 1 + BACK)):
                out = out + codes[:, f - back] @ self.later[back]
            frames.append(out)
        return torch.stack(frames, 1)


def fit(x: torch.Tensor, known: torch.Tensor, groups: int, levels, seed: int = 0) -> PatchCodes:
    """Linear codes for ``groups`` registers a patch.

    Args:
        x: patches through time, ``[samples, T, D]``; squared errors of all their values count alike.
        known: what is reconstructed of them without these registers.
        levels: of a register's codes.
    """
    generator, dims = torch.Generator().manual_seed(seed), len(levels)
    codes = PatchCodes(x.shape[2], groups * dims).to(x)
    scale = x.square().mean().sqrt().clamp(min=1e-6)
    x, known = x / scale, known / scale
    decoder = _LinearDecoder(x.shape[1], codes.start(x, x - known)).to(x)
    parameters = [*codes.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        rate = RATE * min(1.0, (step + 1) / 30) * (0.005 + 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
        values = codes(x[chosen])
        said, _ = flexkernels.fsq_quantize(values.reshape(-1, dims), levels, ids=False)
        # half of the time all groups, else the first few
        few = torch.rand(len(chosen), generator=generator) < 0.5
        kept = torch.where(few, torch.randint(0, groups + 1, (len(chosen),), generator=generator), groups)
        heard = torch.arange(groups * dims) // dims < kept[:, None]
        error = decoder(said.view(values.shape) * heard[:, None].to(x.device), known[chosen]) - x[chosen]
        beyond = (values.abs() - VALUE_RANGE).clamp(min=0).square().mean()
        loss = error.square().mean() + RANGE_WEIGHT * beyond
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for linear in (codes.first, codes.later):
            linear.weight /= scale
    return codes.requires_grad_(False)


class Teacher:
    """What all registers of a grown tokenizer should say: the known ones what the checkpoint's encoder says, the new
    ones linear codes of patches, a group of one register a patch after the other.

    Args:
        model: in training, with more registers than ``old``, which it was started from; new ones are given places.
        old: the checkpoint.
        latents: ``[B, C, T, H, W]``, what the codes are fitted to.
    """

    def __init__(self, model: Tokenizer, old: Tokenizer, latents: torch.Tensor, seed: int = 0) -> None:
        self.config, self.registers, self.known = model.config, model.registers, old.registers
        self.encoder = copy.deepcopy(old.encoder).requires_grad_(False)
        _, *self.grid = grids_of([latents[0]], self.config)[0]
        rows, columns = self.grid
        cells = initial.cells(rows, columns)
        self.order = torch.tensor([row * columns + column for row, column in cells])
        weight = model.codec.pixel_weight(latents.shape[2])
        self.weight = None if weight is None else weight.sqrt()
        self.groups = -(-(self.registers - self.known) // len(cells))
        series = [self._series(x) for x in (latents, _reconstruct(old, latents))]
        self.codes = fit(*series, self.groups, self.config.levels, seed)
        if initial.fits(model, rows, columns):
            _place(model, old.registers, cells, rows, columns)

    @torch.no_grad()
    def values(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """What the registers should say of latents of one shape, each ``[C, T, H, W]``: ``[B, T, N, levels]``."""
        self._to(latents[0].device)
        batch, dims = len(latents), len(self.config.levels)
        series = self.codes(self._series(torch.stack(latents)))
        # [B, patches, T, groups, levels] in the order of registers
        new = series.view(batch, len(self.order), -1, self.groups, dims).permute(0, 2, 3, 1, 4)[:, :, :, self.order]
        new = new.flatten(2, 3)[:, :, : self.registers - self.known]
        known = self.encoder(latents).view(batch, -1, self.known, dims)
        return torch.cat([known, new], 2)

    def loss(self, model: Tokenizer, latents: list[torch.Tensor]) -> torch.Tensor:
        """Mean squared error of the encoder's values, of known and of new registers, and range penalty."""
        wanted = self.values(latents)
        values = model.encoder(latents).view(wanted.shape)
        square = (values.clamp(-VALUE_RANGE, VALUE_RANGE) - wanted.clamp(-VALUE_RANGE, VALUE_RANGE)).square()
        beyond = (values.abs() - VALUE_RANGE).clamp(min=0).square().mean()
        return square[:, :, : self.known].mean() + square[:, :, self.known :].mean() + RANGE_WEIGHT * beyond

    def _series(self, latents: torch.Tensor) -> torch.Tensor:
        """Patches through time ``[B * P, T, D]`` of latents ``[B, C, T, H, W]``, weighted like pixels."""
        if self.weight is not None:
            latents = latents * self.weight
        batch, (frames, *_) = len(latents), grids_of([latents[0]], self.config)[0]
        rows = patchify(latents.unbind(), self.config.patch).view(batch, frames, len(self.order), -1)
        return rows.transpose(1, 2).flatten(0, 1)

    def _to(self, device: torch.device) -> None:
        self.encoder.to(device), self.codes.to(device)
        self.order = self.order.to(device)
        self.weight = None if self.weight is None else self.weight.to(device)


def _reconstruct(model: Tokenizer, latents: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """The mean of all that fits the tokens, in one step of the solver."""
    parts = latents.split(batch)
    return torch.cat(
        [torch.stack(model.decode_latents(model.encode_latents(x), steps=1, guidance=None)) for x in parts]
    )


@torch.no_grad()
def _place(model: Tokenizer, known: int, cells: list[tuple[int, int]], rows: int, columns: int) -> None:
    """Registers of a group start alike but for their places, which are single patches."""
    codes = initial.Codes(model.config.max_frames, rows, columns)
    places = torch.stack([initial.AMPLITUDE * codes((initial.FINE,), None, (i,), (j,)) for i, j in cells])
    count, new = codes.count, model.registers - known
    groups = -(-new // len(cells))
    # [frames, registers, width] and [registers, width], whose frames are elsewhere
    for table, frames in ((model.encoder.registers, True), (model.decoder.register_posemb.table[1, 0].T, False)):
        spread = table[..., :known, count:].std()
        rest = (spread * torch.randn(groups, table.shape[-1] - count)).repeat_interleave(len(cells), 0)[:new]
        table[..., known:, count:] = rest
        table[..., known:, :count] = places.repeat(groups, 1)[:new]
        if frames:
            for i, frame in enumerate(table):
                frame[known:, :count] += initial.AMPLITUDE * codes((initial.CONSTANT,), i)

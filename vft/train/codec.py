"""Fits a :class:`vft.lapped.LappedCodec` to procedural video: analysis and synthesis together, by least squares.

Blocks are first turned into their principal components (all of a first frame's, ``COMPONENTS`` of a group's), which
start the analysis. What is lowered is the squared error, and that of steps between pixels on both sides of a block's
border, so that no border shows: quadratic in analysis and in synthesis, which are solved for in turn.
"""

from __future__ import annotations

import torch

from ..blocks import FIRST, GROUP, to_blocks
from ..lapped import AROUND, LappedCodec, around
from ..vae import LinearCodec
from .procedural import batch

COMPONENTS = {FIRST: 192, GROUP: 192}
# conjugate gradients each time
ITERATIONS = 8
# of a squared step across a border, beside 1 of a squared pixel
BORDER = 8.0
# of the ridge, relative to the mean of the diagonal
RIDGE = 1e-5


def fit(seed: int, clips: int, channels: int = 44, size: int = 64, rounds: int = 3, threads: int = 1) -> LappedCodec:
    """Fits to ``clips`` procedural clips of 17 x size x size pixels.

    The embedded one of 44 channels is ``fit(seed=1_000_000, clips=128)``, turned by :func:`follow`. Raises ValueError
    for settings out of range.
    """
    if not 1 <= channels <= FIRST:
        raise ValueError(f"channels must be in 1..{FIRST}, got {channels}")
    for name, value in (("clips", clips), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    parts = [to_blocks(batch(seed, range(i, min(i + 16, clips)), size, 17, threads)) for i in range(0, clips, 16)]
    first, groups = (torch.cat(blocks) for blocks in zip(*parts, strict=True))
    weights, before = _fit_part("first", first, None, channels, rounds)
    more, _ = _fit_part("group", groups, before, channels, rounds)
    facts = {"format": "vft.lapped_codec", "channels": channels, "seed": seed, "clips": clips, "size": size}
    return LappedCodec(weights | more, {key: str(value) for key, value in (facts | {"rounds": rounds}).items()})


def follow(codec: LappedCodec, other: LinearCodec, seed: int, clips: int, among: int = 24) -> LappedCodec:
    """The same codec with its first ``among`` channels turned so that the first of them are nearly those of ``other``,
    the rest uncorrelated, so that a model of ``other`` can go on with it. Pictures of channels stay orthogonal.

    Measured on ``clips`` procedural clips of 17 x 64 x 64. The embedded codec is
    ``follow(fit(seed=1_000_000, clips=128), LinearCodec.load(), seed=1_000_000, clips=128)``.

    Raises ValueError where ``among`` is less than the channels of ``other`` or more than the codec's.
    """
    if not other.channels <= among <= codec.channels:
        raise ValueError(f"among must be in {other.channels}..{codec.channels}, got {among}")
    video = batch(seed, range(clips))
    ours, theirs = codec.encode(video), other.encode(video)
    weights, back = codec.state_dict(), {}
    for part, frames in (("first", slice(0, 1)), ("group", slice(1, None))):
        of_other = other.scale[0 if part == "first" else 1].double()
        root = weights[f"{part}_weight"].double().sqrt()
        # rows in units of pixels: pictures are orthonormal in both
        y, wanted = _rows(ours[:, :, frames]) * root, _rows(theirs[:, :, frames]) / of_other
        left, _, right = torch.linalg.svd(y[:, :among].T @ wanted, full_matrices=True)
        turn = torch.eye(codec.channels).double()
        turn[: other.channels, :among] = (left[:, : other.channels] @ right).T
        rest = left[:, other.channels :]
        order = torch.linalg.eigh(rest.T @ (y[:, :among].T @ y[:, :among]) @ rest).eigenvectors.flip(1)
        turn[other.channels : among, :among] = (rest @ order).T
        scale = (y @ turn.T).square().mean(0) ** -0.25
        # the proportion of the other's scales goes on
        scale = torch.cat([of_other, scale[other.channels :] * (of_other / scale[: other.channels]).mean()])
        gauge = scale[:, None] * turn * root
        back[part] = torch.linalg.inv(gauge)
        weights[f"{part}_analysis"] = (gauge @ weights[f"{part}_analysis"].double()).float()
        near = weights[f"{part}_synthesis"].double().unflatten(1, (AROUND, codec.channels)) @ back[part]
        weights[f"{part}_synthesis"] = near.flatten(1).float()
        weights[f"{part}_weight"] = (scale**-2).float()
        weights[f"after_{part}"] = (weights[f"after_{part}"].double() @ back[part]).float()
    return LappedCodec(weights, codec.metadata | {"follows": other.name, "among": str(among)})


def first(codec: LappedCodec, channels: int, seed: int, clips: int, size: int = 64) -> LappedCodec:
    """The codec of the first ``channels`` alone, with the best synthesis for these, on ``clips`` procedural clips of
    17 x size x size pixels.

    The embedded one of 24 is ``first(LappedCodec.embedded(44), 24, seed=1_000_000, clips=96)``.

    Raises ValueError for more channels than the codec has, or none.
    """
    if not 1 <= channels <= codec.channels:
        raise ValueError(f"channels must be in 1..{codec.channels}, got {channels}")
    video = batch(seed, range(clips), size)
    (blocks, groups), z = to_blocks(video), codec.encode(video)[:, :channels].permute(0, 2, 3, 4, 1)
    weights = codec.state_dict()
    for part, x, own, before in (("first", blocks, z[:, :1], None), ("group", groups, z[:, 1:], z[:, :1])):
        x = x - weights[f"{part}_mean"]
        basis, read = _components(x), _regressors(own, before)
        synthesis = basis @ _synthesis(x @ basis, read, basis)
        near, *after = synthesis.split([AROUND * channels] + [channels] * (2 * (before is not None)), 1)
        weights[f"{part}_synthesis"] = near
        weights |= dict(zip(("after_first", "after_group"), after, strict=False))
        for name in (f"{part}_analysis", f"{part}_weight"):
            weights[name] = weights[name][:channels]
    return LappedCodec(weights, codec.metadata | {"channels": str(channels)})


def _synthesis(x: torch.Tensor, read: torch.Tensor, basis: torch.Tensor, start: torch.Tensor | None = None):
    """The best synthesis ``[n, r]`` of components ``[..., n]`` from latents ``[..., r]``."""
    inverse = _inverse_gram(read)
    start = torch.zeros(x.shape[-1], read.shape[-1]) if start is None else start
    return _minimise(lambda s: _loss(read @ s.T - x, basis), start, lambda g: g @ inverse)


def _components(centred: torch.Tensor) -> torch.Tensor:
    """The principal components ``[n, COMPONENTS]`` of blocks ``[B, k, h, w, n]``, the largest first."""
    rows = centred.flatten(0, 3)
    basis = torch.linalg.eigh((rows.T @ rows / len(rows)).double()).eigenvectors
    return basis.flip(1)[:, : COMPONENTS[centred.shape[4]]].float()


def _rows(latents: torch.Tensor) -> torch.Tensor:
    """``[B, C, T, h, w]`` -> ``[B T h w, C]``, float64."""
    return latents.movedim(1, -1).flatten(0, -2).double()


def _fit_part(part: str, blocks: torch.Tensor, before: torch.Tensor | None, channels: int, rounds: int):
    """Tensors of one part from its blocks ``[B, k, h, w, n]`` and the first frame's latents ``[B, 1, h, w, C]`` (None
    for the first frame itself); and the latents."""
    mean = blocks.flatten(0, 3).mean(0)
    basis = _components(blocks - mean)
    x = (blocks - mean) @ basis
    analysis, synthesis = _alternate(x, before, basis, channels, rounds)
    # the gauge in which latents are uncorrelated and their pictures orthogonal
    z = around(x) @ analysis.T
    rows = z.flatten(0, 3).double()
    covariance = rows.T @ rows / len(rows)
    half = _power(covariance, 0.5)
    pictures = synthesis.double()[:, : AROUND * channels].reshape(-1, channels)
    energy, turn = torch.linalg.eigh(half @ pictures.T @ pictures @ half)
    energy, turn = energy.flip(0).clamp(min=1e-12), turn.flip(1)
    # standard deviations in pixels are energy**0.5: the latents' follow its root
    scale = energy**0.25 / (energy**0.5).mean() ** 0.5
    gauge = scale[:, None] * (turn.T @ _power(covariance, -0.5))
    analysis = (gauge @ analysis.double()).float()
    z, back = around(x) @ analysis.T, torch.linalg.inv(gauge)
    near, *further = synthesis.double().split([AROUND * channels] + [channels] * (2 * (before is not None)), 1)
    near = (near.unflatten(1, (AROUND, channels)) @ back).flatten(1).float()
    weights = {
        f"{part}_analysis": torch.einsum("cjp,np->cjn", analysis.unflatten(1, (AROUND, -1)), basis).flatten(1),
        f"{part}_mean": mean,
        f"{part}_synthesis": basis @ near,
        f"{part}_weight": (energy / scale**2).float(),
    }
    if before is not None:
        # what comes before has its own gauge; that of later groups is this part's
        first, later = further
        weights |= {"after_first": basis @ first.float(), "after_group": basis @ (later @ back).float()}
    return weights, z


def _alternate(x: torch.Tensor, before: torch.Tensor | None, basis: torch.Tensor, channels: int, rounds: int):
    """Analysis ``[C, 9 n]`` and synthesis ``[n, r]`` of components x ``[B, k, h, w, n]``: each is the best there is for
    the other, nearly, when it is solved for."""
    n, wide = x.shape[4], around(x)
    analysis = torch.zeros(channels, AROUND, n)
    # the block itself
    analysis[:, AROUND // 2, :channels] = torch.eye(channels)
    analysis, synthesis = analysis.flatten(1), torch.zeros(n, channels * (AROUND + 2 * (before is not None)))
    wide_inverse = _inverse_gram(wide)
    for _ in range(rounds):
        synthesis = _synthesis(x, _regressors(wide @ analysis.T, before), basis, synthesis)
        analysis = _minimise(
            lambda a, s=synthesis: _loss(_regressors(wide @ a.T, before) @ s.T - x, basis), analysis,
            lambda g: g @ wide_inverse,
        )  # fmt: skip
    return analysis, _synthesis(x, _regressors(wide @ analysis.T, before), basis, synthesis)


def _loss(error: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The mean over blocks of an error's square, and ``BORDER`` of that of its steps across borders; a block's sums."""
    return error.square().sum(-1).mean() + BORDER * _border(error, basis)


def _minimise(loss, start: torch.Tensor, precondition) -> torch.Tensor:
    """``ITERATIONS`` of preconditioned conjugate gradients on a quadratic loss of one tensor."""

    def slope(p):
        p = p.detach().requires_grad_()
        return torch.autograd.grad(loss(p), p)[0]

    p, constant = start, slope(torch.zeros_like(start))
    residual = -slope(p)
    direction = z = precondition(residual)
    square = (residual * z).sum()
    for _ in range(ITERATIONS):
        curved = slope(direction) - constant
        step = square / (direction * curved).sum()
        p, residual = p + step * direction, residual - step * curved
        z = precondition(residual)
        before, square = square, (residual * z).sum()
        direction = z + square / before * direction
    return p


def _inverse_gram(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.flatten(0, 3)
    gram = (rows.T @ rows).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.inv(gram).float() * len(rows)


def _regressors(z: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """What synthesis reads: the latents around, then those before of the first and of later groups."""
    if before is None:
        return around(z)
    after_first = torch.cat([before, torch.zeros_like(z[:, 1:])], 1)
    after_group = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
    return torch.cat([around(z), after_first, after_group], -1)


def _border(error: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Mean squared step of an error ``[B, k, h, w, components]`` across the borders of its blocks, a block's sum."""
    pixels = basis.unflatten(0, (-1, 8, 8))
    edges = (pixels[:, :, 0], pixels[:, :, 7], pixels[:, 0], pixels[:, 7])
    left, right, top, bottom = (error @ edge.flatten(0, 1).T for edge in edges)
    across, down = right[:, :, :, :-1] - left[:, :, :, 1:], bottom[:, :, :-1] - top[:, :, 1:]
    return (across.square().sum() + down.square().sum()) / error[..., 0].numel()


def _power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=1e-10) ** power) @ vectors.T

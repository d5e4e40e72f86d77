"""Metrics by networks that the user gives: FVD, FID of frames, LPIPS, and ViCLIP's score. Nothing is downloaded.

A network is a TorchScript file. Of values in [-1, 1]:

    fvd    video [B, 3, T, H, W] -> features [B, D]
    fid    frames [B, 3, H, W] -> features [B, D]
    lpips  frames [B, 3, H, W] -> a list of maps [B, C, h, w]; with it a safetensors file of the weights [C] of each
           map, in the order of their sorted names
    viclip video [B, 3, T, H, W] -> embeddings [B, D]; with it a safetensors file of the embedding [D] of each video's
           caption, by a text network outside, under the name of the video's file
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

KINDS = ("fvd", "fid", "lpips", "viclip")
# the second file of a kind, where it has one
BESIDE = {"lpips": "a safetensors file of weights", "viclip": "a safetensors file of captions' embeddings"}
# added to the norm, as published
LPIPS_EPS = 1e-10


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features a ``[N, D]`` and b ``[M, D]``, in float64.

    |mean(a) - mean(b)|^2 + tr(A + B - 2 (A B)^(1/2)) with the sample covariances A and B (divisor N - 1), as in FID
    (Heusel et al. 2017) and FVD (Unterthiner et al. 2018).

    Raises ValueError for other shapes, fewer than two samples or non-finite values.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or x.shape[1] != a.shape[-1] or len(x) < 2:
            raise ValueError(f"{name} must be features [N, {a.shape[-1]}] with N >= 2, got {list(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    a, b = a.double(), b.double()
    left, right = _root(a), _root(b)
    # tr((A B)^(1/2)) is the sum of the singular values of A^(1/2) B^(1/2); A = L' L and B = R' R give those of L R'
    cross = torch.linalg.svdvals(left @ right.T).sum()
    spread = left.square().sum() + right.square().sum() - 2 * cross
    return float((a.mean(0) - b.mean(0)).square().sum() + spread.clamp(min=0))


def _root(x: torch.Tensor) -> torch.Tensor:
    """L ``[min(N, D), D]`` with L' L = the covariance of x."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R


def lpips_distance(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """LPIPS ``[B]`` (Zhang et al. 2018) of feature maps ``[B, C, h, w]`` of each layer, with ``[C]`` weights.

    Sum over layers of the mean over pixels of sum_c w_c (a_c / |a| - b_c / |b|)^2, norms over channels plus 1e-10.

    Raises ValueError where the numbers of layers or the shapes differ.
    """
    if not len(a) == len(b) == len(weights) or not a:
        raise ValueError(f"a, b and weights must have as many layers, got {len(a)}, {len(b)} and {len(weights)}")
    total = torch.zeros(len(a[0]), dtype=a[0].dtype, device=a[0].device)
    for x, y, w in zip(a, b, weights, strict=True):
        if x.shape != y.shape or x.dim() != 4 or w.numel() != x.shape[1]:
            raise ValueError(
                f"maps must be [B, C, h, w] with C weights, got {list(x.shape)}, {list(y.shape)}, {w.numel()}"
            )
        difference = (_unit(x) - _unit(y)).square()
        total = total + (difference * w.to(x).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


def clip_score(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine ``[N]`` between embeddings ``[N, D]`` of videos and of their captions, in float64, unscaled.

    The similarity of CLIP (Radford et al. 2021) that ViCLIP (Wang et al. 2023) has for videos; higher is better.

    Raises ValueError for other shapes, and for an embedding that is 0 or not finite.
    """
    if video.dim() != 2 or video.shape != text.shape:
        raise ValueError(f"video and text must be embeddings [N, D], got {list(video.shape)} and {list(text.shape)}")
    units = []
    for name, x in (("video", video.double()), ("text", text.double())):
        norm = x.square().sum(1, keepdim=True).sqrt()
        if not (torch.isfinite(norm) & (norm > 0)).all():
            raise ValueError(f"{name} must have finite embeddings other than 0, got norm {norm.flatten().tolist()}")
        units.append(x / norm)
    return (units[0] * units[1]).sum(1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + LPIPS_EPS)


class Network:
    """A feature network of one kind. ``protocol`` tells which files it was, by name and SHA-256.

    Raises ValueError for another kind, a missing or surplus file, or one that cannot be read.
    """

    def __init__(self, kind: str, files: Sequence[Path], device: torch.device | str = "cpu") -> None:
        if kind not in KINDS:
            raise ValueError(f"metric must be one of {', '.join(KINDS)}, got {kind!r}")
        wanted = ["a TorchScript file", *([BESIDE[kind]] if kind in BESIDE else [])]
        if len(files) != len(wanted):
            raise ValueError(f"metric {kind} needs {' and '.join(wanted)}, got {len(files)} files")
        self.kind = kind
        self.protocol = [{"file": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files]
        try:
            self.net = torch.jit.load(files[0], map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{files[0]}: not a TorchScript file ({str(error).splitlines()[0]})") from error
        self.table: dict[str, torch.Tensor] = {}
        if kind in BESIDE:
            try:
                self.table = {name: x.flatten() for name, x in sorted(load_file(files[1]).items())}
            except SafetensorError as error:
                raise ValueError(f"{files[1]} must be a complete safetensors file: {error}") from error

    @torch.no_grad()
    def features(self, video: torch.Tensor) -> torch.Tensor:
        """``[B, 3, T, H, W]`` -> ``[B, D]`` (fvd, viclip) or ``[B T, D]`` (fid), on the CPU."""
        made = self.net(_frames(video) if self.kind == "fid" else video.clamp(-1, 1))
        if not isinstance(made, torch.Tensor) or made.dim() != 2:
            raise ValueError(f"the network of {self.kind} must give features [B, D], got {_described(made)}")
        return made.float().cpu()

    @torch.no_grad()
    def distances(self, video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """LPIPS of each frame of ``[B, 3, T, H, W]``, mean over those of a clip: ``[B]``, on the CPU."""
        maps = [self.net(_frames(x)) for x in (video, reference)]
        if not all(isinstance(m, (list, tuple)) for m in maps):
            raise ValueError(f"the network of lpips must give a list of maps, got {_described(maps[0])}")
        weights = [w.to(video.device) for w in self.table.values()]
        return lpips_distance(*maps, weights).view(len(video), -1).mean(1).cpu()

    def check(self, name: str) -> None:
        """Raises ValueError where the table has no caption of the file ``name``."""
        if name not in self.table:
            raise ValueError(f"{self.protocol[1]['file']} must have an embedding named {name!r}, of its caption")

    def similarity(self, video: torch.Tensor, name: str) -> float:
        """:func:`clip_score` of a video ``[1, 3, T, H, W]`` and the caption of the file ``name``.

        Raises ValueError where the table has no such caption, or one of another length.
        """
        self.check(name)
        return float(clip_score(self.features(video), self.table[name][None]))


def _frames(video: torch.Tensor) -> torch.Tensor:
    return video.clamp(-1, 1).transpose(1, 2).flatten(0, 1)


def _described(value) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__

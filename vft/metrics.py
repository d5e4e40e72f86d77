"""How near a video is to another: PSNR, SSIM and GMSD of clips ``[B, 3, T, H, W]`` in [-1, 1], PSNR of 8-bit frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# SSIM (Wang et al. 2004): a Gaussian window, and (0.01 L)^2, (0.03 L)^2 for values of range L = 1
WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2
# GMSD (Xue et al. 2014): the constant for values of range 1
GMSD_C = 170 / 255**2


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each clip ``[B]`` in dB, values clamped to [-1, 1]; higher is better."""
    return _decibels((video.clamp(-1, 1) - reference).square().mean((1, 2, 3, 4)), peak=2)


def frames_psnr(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """The same in dB over all values of two uint8 tensors of one shape; inf where they are equal."""
    if frames.shape != reference.shape:
        raise ValueError(f"frames must have the reference's shape {list(reference.shape)}, got {list(frames.shape)}")
    return float(_decibels((frames.double() - reference.double()).square().mean(), peak=255))


def _decibels(error: torch.Tensor, peak: float) -> torch.Tensor:
    return 10 * (peak**2 / error).log10()


def ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each clip's luma ``[B]``, frame by frame (Wang et al. 2004); 1 is equal.

    Raises ValueError for frames smaller than the window of 11 x 11.
    """
    x, y = _luma(video), _luma(reference)
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"frames must be at least {WINDOW}x{WINDOW}, got {x.shape[-2]}x{x.shape[-1]}")
    bell = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    bell = (bell / bell.sum()).to(x)
    blur = lambda z: F.conv2d(F.conv2d(z, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.mean((1, 2, 3)).view(len(video), -1).mean(1)


def gmsd(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude similarity deviation of each clip's luma ``[B]`` (Xue et al. 2014), a perceptual distance
    without learned weights; 0 is equal."""
    prewitt = torch.tensor([[1.0, 0, -1]] * 3, device=video.device) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]

    def magnitude(z: torch.Tensor) -> torch.Tensor:
        gradients = F.conv2d(F.avg_pool2d(_luma(z), 2), kernels.to(z.dtype), padding=1)
        return gradients.square().sum(1).sqrt()

    a, b = magnitude(video), magnitude(reference)
    similarity = (2 * a * b + GMSD_C) / (a * a + b * b + GMSD_C)
    return similarity.flatten(1).std(1, correction=0).view(len(video), -1).mean(1)


def _luma(video: torch.Tensor) -> torch.Tensor:
    # [B, 3, T, H, W] in [-1, 1] -> [B * T, 1, H, W] in [0, 1], ITU-R BT.601
    weight = torch.tensor([0.299, 0.587, 0.114], device=video.device, dtype=video.dtype).view(1, 3, 1, 1, 1)
    return ((video.clamp(-1, 1) + 1) / 2 * weight).sum(1).flatten(0, 1)[:, None]


METRICS: dict[str, Callable] = {"psnr": psnr, "ssim": ssim, "gmsd": gmsd}

"""Frames in memory: what a video is here, and the step between 8-bit frames and what a model takes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

PATCH = 16


class VideoError(ValueError):
    """A file cannot be read as a video; the message names the file and the reason."""


class VideoWarning(UserWarning):
    """Something of a file was lost or changed; the message names the file."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, uint8 ``[T, H, W, 3]`` RGB, and its frame rate.

    ``height`` and ``width`` are those of the source in square pixels, upright and before any resize; ``warnings`` say
    what was lost or changed.
    """

    frames: torch.Tensor
    fps: float
    height: int
    width: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class VideoStream:
    """An open video: ``frames`` yields uint8 ``[H, W, 3]`` one by one; the rest is as in :class:`Video`.

    ``warnings`` is complete once all frames have been read; ``audio`` says whether the file has an audio track.
    """

    frames: Iterator[torch.Tensor]
    fps: float
    height: int
    width: int
    warnings: list[str] = field(default_factory=list)
    audio: bool = False


def cut_chunks(
    frames: Iterable[torch.Tensor], size: int, overlap: int, stride: int = 1
) -> Iterator[tuple[torch.Tensor, int]]:
    """Cut a stream of frames ``[...]`` into chunks ``[size, ...]`` that share ``overlap`` frames.

    Holds one chunk at a time. Yields each chunk and how many of its frames no chunk before it held. The last chunk is
    the shortest of 1 + ``stride`` k frames that holds what is left, filled by repeating the last frame.

    Raises:
        ValueError: there is no frame.
    """
    held, new = [], 0
    for frame in frames:
        if len(held) == size:
            yield torch.stack(held), new
            held, new = held[size - overlap :], 0
        held.append(frame)
        new += 1
    if not held:
        raise ValueError("video must have at least one frame, got 0")
    held += held[-1:] * ((1 - len(held)) % stride)
    yield torch.stack(held), new


def fit(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Crop the centred square of uint8 ``[T, H, W, 3]`` (the shorter side decides) and resize it, see :func:`resize`.

    Returns uint8 ``[T, size, size, 3]``; what lies outside the square is cut away.

    Raises:
        ValueError: ``size`` is not a positive multiple of 16, or frames have another shape.
    """
    check_size(size)
    check_frames(frames)
    side = min(frames.shape[1:3])
    return resize(_crop(frames, side, side), size, size)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 ``[T, H, W, 3]`` to ``[T, height, width, 3]``: bicubic, antialiased, rounded."""
    check_frames(frames)
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    # 8-bit antialiased resizing exists on the CPU only
    pixels = frames.permute(0, 3, 1, 2).cpu()
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return pixels.permute(0, 2, 3, 1).contiguous().to(frames.device)


def preprocess(frames: torch.Tensor, size: int | None = None, device: torch.device | None = None) -> torch.Tensor:
    """Frames as a model takes them: uint8 ``[T, H, W, 3]`` -> float32 ``[3, T, H', W']`` in [-1, 1], on ``device``.

    With ``size``, frames go through :func:`fit`; without, each side is cropped around the centre to a multiple of 16.
    They go to the device as bytes, without waiting where they lie in pinned memory; None leaves them where they are.

    Raises:
        ValueError: frames have another shape, dtype, no frame, or a side below 16 and no ``size``.
    """
    return from_uint8(fitted(frames, size).to(device, non_blocking=True))


def fitted(frames: torch.Tensor, size: int | None) -> torch.Tensor:
    """The frames that :func:`preprocess` takes, still uint8 ``[T, H', W', 3]`` and where they were."""
    check_frames(frames)
    if frames.shape[0] == 0:
        raise ValueError("frames must hold at least one frame, got none")
    if size is not None:
        return fit(frames, size)
    height, width = (side - side % PATCH for side in frames.shape[1:3])
    if not height or not width:
        raise ValueError(f"frames must be at least {PATCH} pixels on each side, got {list(frames.shape[1:3])}")
    return _crop(frames, height, width)


def from_uint8(frames: torch.Tensor) -> torch.Tensor:
    """uint8 ``[T, H, W, 3]`` -> float32 ``[3, T, H, W]`` in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Model output as frames: float ``[3, T, H, W]`` or ``[1, 3, T, H, W]`` in [-1, 1] -> uint8 ``[T, H, W, 3]``.

    Values outside the range are clipped.

    Raises:
        ValueError: another shape, or a value that is NaN.
    """
    if video.dim() == 5 and video.shape[0] == 1:
        video = video[0]
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(f"video must have shape [3, T, H, W] or [1, 3, T, H, W], got {list(video.shape)}")
    video = video.detach().to(torch.float32)
    if torch.isnan(video).any():
        raise ValueError("video must be free of NaN")
    return video.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width].contiguous()


def check_size(size: int) -> None:
    if size < PATCH or size % PATCH:
        raise ValueError(f"size must be a positive multiple of {PATCH}, got {size}")


def check_frames(frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")

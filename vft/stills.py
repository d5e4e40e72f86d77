"""Where nothing moves, a latent frame repeats the ids before it, and is decoded to the last frame shown.

The encoder sees where in a chunk a latent frame lies, so a still picture would get other ids, and the decoder other
noise, every few frames: it would flicker.
"""

from collections.abc import Sequence

import torch

# of 255 levels: the most that a value may change, and all values on average
MOST, MEAN = 6.0, 0.6


def still_groups(chunk: torch.Tensor, stride: int) -> list[bool]:
    """Whether each group of ``stride`` frames shows what was shown before it: uint8 or float in [-1, 1] frames
    ``[1 + stride k, ...]`` -> k values. The frame before a run of still groups is what each of them is compared with.
    """
    scale = 127.5 if chunk.is_floating_point() else 1.0
    shown, still = chunk[:1].float(), []
    for first in range(1, len(chunk), stride):
        group = chunk[first : first + stride]
        change = (group.float() - shown).abs_().mul_(scale).flatten(1)
        still.append(bool(change.max() <= MOST) and bool(change.mean(1).max() <= MEAN))
        if not still[-1]:
            shown = group[-1:].float()
    return still


def join_ids(chunks: Sequence[torch.Tensor], still: Sequence[list[bool]]) -> torch.Tensor:
    """The ids of a video from those of its chunks ``[1 + k, N]``; every chunk but the first drops its first row.

    A still group has the ids of the latent frame before it; but not the very first group, as the first latent frame
    holds one frame alone and knows less than the group adds.
    """
    rows = [chunks[0][0]]
    for ids, groups in zip(chunks, still, strict=True):
        for row, same in zip(ids[1:], groups, strict=True):
            rows.append(rows[-1] if same and len(rows) > 1 else row)
    return torch.stack(rows)


def repeats(ids: torch.Tensor) -> torch.Tensor:
    """Whether each latent frame of ids ``[T, N]`` repeats the one before it: bool ``[T]``."""
    same = torch.zeros(len(ids), dtype=torch.bool)
    same[1:] = (ids[1:] == ids[:-1]).all(1)
    return same


def hold(video: torch.Tensor, still: list[bool], stride: int) -> torch.Tensor:
    """Video ``[B, 3, 1 + stride k, H, W]`` in which each still latent frame shows the last frame before it.

    Still ones at the end may be missing from the video given.
    """
    frames = [video[:, :, :1]]
    for k, same in enumerate(still[1:]):
        group = video[:, :, 1 + k * stride : 1 + (k + 1) * stride]
        frames.append(frames[-1][:, :, -1:].expand(-1, -1, stride, -1, -1) if same else group)
    return torch.cat(frames, 2)

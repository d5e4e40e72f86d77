"""Blocks of 8 x 8 pixels of the first frame and of each group of four: what the linear codecs transform."""

import torch

# values of a block of the first frame, rows of (channel, y, x), and of a group, (channel, t, y, x)
FIRST, GROUP = 192, 768


def to_blocks(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Video [B, 3, 1 + 4k, 8h, 8w] -> first frame's blocks [B, 1, h, w, 192], groups' blocks [B, k, h, w, 768]."""
    batch, _, _, height, width = video.shape

    def cut(part, length):
        part = part.reshape(batch, 3, part.shape[2] // length, length, height // 8, 8, width // 8, 8)
        return part.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)

    return cut(video[:, :, :1], 1), cut(video[:, :, 1:], 4)


def to_frames(blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The inverse of `to_blocks` for one part: [B, k, h, w, 3 * length * 64] -> [B, 3, k * length, 8h, 8w]."""
    batch, groups, height, width = blocks.shape[:4]
    video = blocks.reshape(batch, groups, height, width, 3, length, 8, 8).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return video.reshape(batch, 3, groups * length, height * 8, width * 8)

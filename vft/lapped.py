"""A linear codec whose windows overlap, so that no block edges show.

    z[i] = A @ [x[j] - mean  for the 3 x 3 blocks j around i]         analysis
    x[i] = S @ [z[j]         for the 3 x 3 blocks j around i] + P @ z_before[i] + mean       synthesis

x are blocks of 8 x 8 pixels of the first frame (192 values) and of each group of four frames (768), and z_before the
latent of the same place one latent frame earlier. Blocks at the border stand in for those beyond it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

from .blocks import FIRST, GROUP, to_blocks, to_frames
from .codec import LAPPED, Codec, read_weights
from .files import replacing

# channels of the embedded ones; the first ones of more are those of fewer
CHANNELS = (24, 44)
AROUND = 9


class LappedCodec(Codec):
    """``weights`` are the tensors of :func:`shapes`, float; ``metadata`` says how they were fitted.

    A latent's scale is that of its spectrum's square root, see :func:`vft.train.codec.fit`, and 1 on average.
    """

    name = LAPPED
    linear = True

    def __init__(self, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        super().__init__()
        self.channels = len(weights["first_analysis"])
        self.metadata = dict(metadata or {})
        for key in shapes(self.channels):
            self.register_buffer(key, weights[key].float())

    @classmethod
    def embedded(cls, channels: int = CHANNELS[-1]) -> LappedCodec:
        """Raises ValueError for other ``channels`` than ``CHANNELS``."""
        if channels not in CHANNELS:
            raise ValueError(f"channels of the codec {LAPPED!r} must be one of {CHANNELS}, got {channels}")
        return cls.load(asset(channels))

    @classmethod
    def load(cls, path: str | os.PathLike) -> LappedCodec:
        """Reads a file that :meth:`save` wrote. Raises ValueError for any other file."""
        weights, metadata = read_weights(path)
        found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        expected = shapes(len(weights.get("first_analysis", ())))
        if found != expected:
            raise ValueError(f"{os.fspath(path)!r} must hold a lapped codec {expected}, got {found}")
        return cls(weights, metadata)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, complete or not at all: float16, 38 kB a channel."""
        weights = {key: tensor.half().contiguous() for key, tensor in self.named_buffers()}
        with replacing(path) as temporary:
            temporary.write_bytes(save(weights, metadata=self.metadata))

    def pixel_weight(self, latent_frames: int) -> torch.Tensor:
        weight = torch.stack([self.first_weight] + [self.group_weight] * (latent_frames - 1), 1)
        return (weight / weight.mean())[:, :, None, None]

    def _encode(self, video, generator):
        first, groups = to_blocks(video.to(self.first_mean.dtype))
        first = around(first - self.first_mean) @ self.first_analysis.T
        groups = around(groups - self.group_mean) @ self.group_analysis.T
        return torch.cat([first, groups], 1).permute(0, 4, 1, 2, 3).contiguous()

    def _decode(self, latents):
        z = latents.to(self.first_mean.dtype).permute(0, 2, 3, 4, 1)
        first = around(z[:, :1]) @ self.first_synthesis.T + self.first_mean
        groups = around(z[:, 1:]) @ self.group_synthesis.T + self.group_mean
        groups[:, :1] += z[:, :1][:, : groups.shape[1]] @ self.after_first.T
        groups[:, 1:] += z[:, 1:-1] @ self.after_group.T
        return torch.cat([to_frames(first, 1), to_frames(groups, 4)], 2)


def asset(channels: int) -> Path:
    """The file of an embedded codec."""
    return Path(__file__).parent / "assets" / f"lapped_{channels}.safetensors"


def shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a codec's tensors by name. ``*_weight``: what a latent's squared error counts in pixels."""
    found = {"after_first": (GROUP, channels), "after_group": (GROUP, channels)}
    for part, size in (("first", FIRST), ("group", GROUP)):
        found |= {
            f"{part}_analysis": (channels, AROUND * size),
            f"{part}_mean": (size,),
            f"{part}_synthesis": (size, AROUND * channels),
            f"{part}_weight": (channels,),
        }
    return found


def around(blocks: torch.Tensor) -> torch.Tensor:
    """``[B, k, h, w, n]`` -> ``[B, k, h, w, 9 n]``: the 3 x 3 blocks around each, row by row."""
    height, width = blocks.shape[2:4]
    # padding of no values is refused
    if blocks.numel() == 0:
        return blocks.new_zeros(*blocks.shape[:4], AROUND * blocks.shape[4])
    wide = F.pad(blocks.permute(0, 4, 1, 2, 3).flatten(1, 2), (1, 1, 1, 1), mode="replicate")
    wide = wide.unflatten(1, (blocks.shape[4], blocks.shape[1])).permute(0, 2, 3, 4, 1)
    return torch.cat([wide[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1)

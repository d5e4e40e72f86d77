"""A small network that goes over frames that a tokenizer decoded: it takes the edges of blocks away, and some blur.

    y = x + unshuffled^-1(last(silu(h))),   h = first(unshuffled(x)) + place,  h += conv_i(silu(h))

``unshuffled`` makes 4 x 4 pixels one place of 48 channels; all convolutions are 3 x 3; ``place`` tells the four corners
of a block of 8 x 8 pixels apart. Frames are refined one by one, so nothing depends on a later one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# of names in a checkpoint, behind that of the codec
PREFIX = "refiner."
# sides of a place and of a block in pixels
PLACE, BLOCK = 4, 8
WIDTH, DEPTH = 64, 4


class Refiner(nn.Module):
    """video ``[B, 3, T, H, W]`` in [-1, 1], floating point, H and W multiples of 8 -> the same shape and dtype; at
    first nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3 * PLACE**2
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(WIDTH, BLOCK // PLACE, BLOCK // PLACE))
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(DEPTH))
        self.last = nn.Conv2d(WIDTH, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> Refiner:
        """Of tensors whose names begin with PREFIX. Raises ValueError for missing or other ones."""
        if wrong := sorted(name for name in state if not name.startswith(PREFIX)):
            raise ValueError(f"state_dict of an embedded codec must hold a refiner alone, {PREFIX}*, got {wrong[0]!r}")
        # without drawing weights first, which would move the caller's random numbers
        with torch.device("meta"):
            made = cls()
        tensors = {name.removeprefix(PREFIX): tensor.float() for name, tensor in state.items()}
        try:
            made.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"state_dict must hold a whole refiner: {str(error).splitlines()[-1].strip()}") from error
        return made.eval().requires_grad_(False)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        # torch leaves an empty batch as it is where pixels become channels
        if video.numel() == 0:
            return video
        frames = video.transpose(1, 2).flatten(0, 1).to(self.place.dtype)
        h = self.first(F.pixel_unshuffle(frames, PLACE))
        h = h + self.place.repeat(1, h.shape[2] * PLACE // BLOCK, h.shape[3] * PLACE // BLOCK)
        for conv in self.convs:
            h = h + conv(F.silu(h))
        change = F.pixel_shuffle(self.last(F.silu(h)), PLACE)
        return video + change.unflatten(0, (-1, video.shape[2])).transpose(1, 2).to(video.dtype)

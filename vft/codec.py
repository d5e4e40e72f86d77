"""Latent codecs: what turns a video into the latents that the tokenizer works on, and back.

Every codec is causal and packs 1 + 4k frames into 1 + k latent frames at an eighth of the resolution: the first frame
alone, then groups of four.
"""

import os

import torch
from safetensors import SafetensorError, safe_open

# codecs that a config may name: the embedded ones of `vft.vae` and `vft.lapped`, and the published one of `vft.vidtok`
LINEAR = "linear"
LAPPED = "lapped"
VIDTOK = "vidtok_kl_causal_488_16chn"
EMBEDDED = LINEAR, LAPPED


class Codec(torch.nn.Module):
    """The interface. A codec has `name` and `channels`, and implements `_encode` and `_decode` on checked input."""

    temporal_stride = 4
    spatial_stride = 8
    # whether :meth:`render` is linear, a constant aside
    linear = False
    name: str
    channels: int

    def __init__(self) -> None:
        super().__init__()
        # goes over decoded frames where a checkpoint has one, see `vft.refiner`
        self.refiner: torch.nn.Module | None = None

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, 1 + k, H / 8, W / 8) for a video of 1 + 4k frames of H x W pixels; ValueError for any other size."""
        if frames < 1 or frames % self.temporal_stride != 1:
            raise ValueError(f"video must have 1 + {self.temporal_stride}k frames, got {frames}")
        for axis, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial_stride:
                raise ValueError(f"video {axis} must be a positive multiple of {self.spatial_stride}, got {size}")
        stride = self.spatial_stride
        return self.channels, 1 + frames // self.temporal_stride, height // stride, width // stride

    def pixel_weight(self, latent_frames: int) -> torch.Tensor | None:
        """What the squared error of each latent counts in pixels, ``[C, T, 1, 1]`` with mean 1; None where unknown."""
        return None

    @torch.no_grad()
    def encode(self, video: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Video, floating [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> latents, float32 [B, C, 1 + k, H / 8, W / 8].

        With a generator, a codec that has a posterior samples it; without one it gives the mean. Raises TypeError for
        an integer video, ValueError for a wrong shape.
        """
        if not video.is_floating_point():
            raise TypeError(f"video must be floating point, got {video.dtype}")
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must have shape [B, 3, T, H, W], got {list(video.shape)}")
        self.latent_shape(*video.shape[2:])
        return self._encode(video, generator).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents, floating [B, C, 1 + k, h, w] -> video, float32 [B, 3, 1 + 4k, 8h, 8w], by the refiner where there is
        one.

        The video is not clamped: values may leave [-1, 1]. Raises TypeError for integers, ValueError for a wrong shape.
        """
        if not latents.is_floating_point():
            raise TypeError(f"latents must be floating point, got {latents.dtype}")
        if latents.ndim != 5 or latents.shape[1] != self.channels or 0 in latents.shape[2:]:
            raise ValueError(f"latents must have shape [B, {self.channels}, T, h, w], got {list(latents.shape)}")
        video = self.render(latents)
        return video if self.refiner is None else self.refiner(video)

    def _encode(self, video: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        raise NotImplementedError

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def render(self, latents: torch.Tensor) -> torch.Tensor:
        """:meth:`decode` with gradients, of latents that are not checked, and without the refiner."""
        return self._decode(latents).float()


def read_weights(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises ValueError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a safetensors file: {error}") from error

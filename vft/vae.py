"""The codec of the first embedded models, a linear transform of blocks, and the choice of a codec by its name.

New models use `vft.lapped.LappedCodec`; the published variational autoencoder is `vft.vidtok.VidTokCodec`;
`vft.codec.Codec` says what all codecs do.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import save

from .blocks import to_blocks, to_frames
from .codec import EMBEDDED, LAPPED, LINEAR, VIDTOK, Codec, read_weights
from .files import replacing
from .lapped import LappedCodec
from .refiner import Refiner
from .train.procedural import batch
from .vidtok import VidTokCodec

ASSET = Path(__file__).parent / "assets" / "codec.safetensors"


class LinearCodec(Codec):
    """A fixed linear transform of 8 x 8 blocks: two orthonormal bases fitted by principal components.

    A block of the first frame (192 values) and of each group of four frames (768 values) becomes `channels`
    coefficients, each group by itself. Latent = scale[part, c] times the coefficient, with scale proportional to
    std(c)**-0.5: half of the whitening, so that a flow model sees a spectrum of small range and variance 1 on average.
    """

    name = LINEAR
    linear = True

    def __init__(self, first_basis, first_mean, group_basis, group_mean, scale, metadata=None):
        super().__init__()
        self.channels = first_basis.shape[0]
        self.metadata = dict(metadata or {})
        self.register_buffer("first_basis", first_basis)  # [C, 192], a row is (channel, y, x)
        self.register_buffer("first_mean", first_mean)  # [192]
        self.register_buffer("group_basis", group_basis)  # [C, 768], a row is (channel, t, y, x)
        self.register_buffer("group_mean", group_mean)  # [768]
        self.register_buffer("scale", scale)  # [2, C]

    @classmethod
    def load(cls, path: str | os.PathLike = ASSET) -> "LinearCodec":
        """Reads a file that `save` wrote; the embedded one by default. Raises ValueError for any other file."""
        tensors, metadata = read_weights(path)
        channels = len(tensors.get("first_basis", ()))
        expected = _linear_shapes(channels)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if channels == 0 or found != expected:
            raise ValueError(f"{os.fspath(path)!r} must hold a linear codec {expected}, got {found}")
        return cls(**{name: tensor.float() for name, tensor in tensors.items()}, metadata=metadata)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, complete or not at all: float32, 3.9 kB a channel."""
        tensors = {name: tensor.contiguous() for name, tensor in self.named_buffers()}
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata=self.metadata))

    def pixel_weight(self, latent_frames: int) -> torch.Tensor:
        # the bases are orthonormal
        weight = torch.stack([self.scale[0]] + [self.scale[1]] * (latent_frames - 1), 1) ** -2
        return (weight / weight.mean())[:, :, None, None]

    def _encode(self, video, generator):
        first, groups = to_blocks(video.to(self.scale.dtype))
        first = (first - self.first_mean) @ self.first_basis.T * self.scale[0]
        groups = (groups - self.group_mean) @ self.group_basis.T * self.scale[1]
        return torch.cat([first, groups], 1).permute(0, 4, 1, 2, 3).contiguous()

    def _decode(self, latents):
        latents = latents.to(self.scale.dtype).permute(0, 2, 3, 4, 1)
        first = (latents[:, :1] / self.scale[0]) @ self.first_basis + self.first_mean
        groups = (latents[:, 1:] / self.scale[1]) @ self.group_basis + self.group_mean
        return torch.cat([to_frames(first, 1), to_frames(groups, 4)], 2)


def load_codec(name: str, state_dict: dict[str, torch.Tensor] | None = None, channels: int | None = None) -> Codec:
    """The codec called `name`: "lapped" or "linear" (embedded), with the refiner of a `state_dict` that has one, or
    VidTok from its published `state_dict`.

    `channels` choose between those of "lapped" (None: the most). Raises ValueError for an unknown name, a state_dict
    that is missing, unwanted or does not fit, or channels that the codec "lapped" does not come with.
    """
    if name in EMBEDDED:
        codec = LinearCodec.load() if name == LINEAR else LappedCodec.embedded(*filter(None, [channels]))
        if state_dict is not None:
            codec.refiner = Refiner.from_state_dict(state_dict)
        return codec
    if name == VIDTOK:
        if state_dict is None:
            raise ValueError(f"state_dict must hold the weights of {name!r}, got None")
        return VidTokCodec.from_state_dict(state_dict)
    raise ValueError(f"codec must be one of {[LINEAR, LAPPED, VIDTOK]}, got {name!r}")


def fit_linear_codec(seed: int, clips: int, channels: int = 16, size: int = 64, threads: int = 1) -> LinearCodec:
    """Fits a `LinearCodec` to `clips` procedural clips of 17 x size x size pixels.

    The embedded one is `fit_linear_codec(seed=1_000_000, clips=2000).save(ASSET)`.
    """
    if not 1 <= channels <= 192:
        raise ValueError(f"channels must be in 1..192, got {channels}")
    if clips < 1:
        raise ValueError(f"clips must be >= 1, got {clips}")
    moments = [_Moments(192), _Moments(768)]
    for start in range(0, clips, 16):
        video = batch(seed, range(start, min(start + 16, clips)), size=size, threads=threads)
        for part, blocks in zip(moments, to_blocks(video), strict=True):
            part.add(blocks)
    (first_basis, first_mean, first_scale), (group_basis, group_mean, group_scale) = (m.fit(channels) for m in moments)
    metadata = {"format": "vft.linear_codec", "channels": channels, "seed": seed, "clips": clips, "size": size}
    return LinearCodec(
        first_basis,
        first_mean,
        group_basis,
        group_mean,
        torch.stack([first_scale, group_scale]),
        {key: str(value) for key, value in metadata.items()},
    )


class _Moments:
    """Running mean and covariance of vectors, in float64."""

    def __init__(self, size):
        self.count, self.sum, self.square = 0, torch.zeros(size).double(), torch.zeros(size, size).double()

    def add(self, vectors):
        vectors = vectors.flatten(0, -2).double()
        self.count += len(vectors)
        self.sum += vectors.sum(0)
        self.square += vectors.T @ vectors

    def fit(self, channels):
        """The leading eigenvectors [C, n] (largest first, largest entry positive), the mean and the scale [C]."""
        mean = self.sum / self.count
        variance, vectors = torch.linalg.eigh(self.square / self.count - mean.outer(mean))
        basis, std = vectors[:, -channels:].flip(1).T, variance[-channels:].flip(0).sqrt()
        peak = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        scale = std**-0.5 / std.mean() ** 0.5
        return tuple(t.float().contiguous() for t in (basis * peak.sign(), mean, scale))


def _linear_shapes(channels):
    return {
        "first_basis": (channels, 192),
        "first_mean": (192,),
        "group_basis": (channels, 768),
        "group_mean": (768,),
        "scale": (2, channels),
    }

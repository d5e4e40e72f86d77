"""VidTok, the published latent codec of VideoFlexTok: `vidtok_kl_causal_488_16chn` (arXiv 2412.13061).

A causal 3-D convolutional autoencoder: 17 x 128 x 128 pixels become 5 x 16 x 16 latents of 16 channels. Parameter names
are the published ones. Time is padded with zeros on the left and upsampled by repetition, as the published inference
code does; later VidTok releases repeat the first frame and interpolate instead, and give other values.

Activations are [B, C, T, H, W] in channels-last memory; convolutions over space or time alone run as 3-D ones.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .codec import VIDTOK, Codec


class VidTokCodec(Codec):
    """The published network. `width` 128 and `multipliers` (1, 2, 4, 4) are those of the released weights.

    Latents are the posterior mean, unscaled; `encode(video, generator)` samples the posterior. Weights may be float32,
    bfloat16 or float16: the network computes in their dtype.
    """

    name = VIDTOK

    def __init__(self, width: int = 128, multipliers: tuple[int, ...] = (1, 2, 4, 4), channels: int = 16):
        super().__init__()
        self.channels = channels
        self.vidtok = nn.Module()
        self.vidtok.encoder = _Encoder(width, multipliers, channels)
        self.vidtok.decoder = _Decoder(width, multipliers, channels)
        self.requires_grad_(False).eval()

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, torch.Tensor], **config) -> "VidTokCodec":
        """A codec on the tensors of state_dict: published names without `vae.`, such as `vidtok.encoder.conv_in...`.

        `config` is passed to the constructor. Raises ValueError naming missing and surplus keys or a wrong shape.
        """
        with torch.device("meta"):
            codec = cls(**config)
        expected = codec.state_dict()
        _check_keys("missing", expected.keys() - state_dict.keys())
        _check_keys("surplus", state_dict.keys() - expected.keys())
        for key, tensor in expected.items():
            if tensor.shape != state_dict[key].shape:
                got = list(state_dict[key].shape)
                raise ValueError(f"state_dict[{key!r}] must have shape {list(tensor.shape)}, got {got}")
        codec.load_state_dict(state_dict, assign=True)
        return codec.requires_grad_(False).eval()

    def _encode(self, video, generator):
        moments = self.vidtok.encoder(video.to(self._dtype()))
        mean, log_variance = moments.float().chunk(2, 1)
        if generator is None:
            return mean.contiguous()
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        return mean + noise * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def _decode(self, latents):
        return self.vidtok.decoder(latents.to(self._dtype())).contiguous()

    def _dtype(self):
        return self.vidtok.encoder.conv_in.conv.weight.dtype


def _check_keys(what, keys):
    if keys:
        names = sorted(keys)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"state_dict must hold the VidTok weights, got {what} keys {', '.join(names[:4])}{more}")


class _Encoder(nn.Module):
    def __init__(self, width, multipliers, channels):
        super().__init__()
        widths, last = [width * m for m in multipliers], len(multipliers) - 1
        self.conv_in = _CausalConv(nn.Conv3d, 3, width)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        for level, (before, here) in enumerate(zip([width, *widths], widths, strict=False)):
            self.down.append(_Level(nn.Conv2d, before, here, blocks=2))
            self.down_temporal.append(_Level(nn.Conv1d, here, here, blocks=2))
            if level < last:
                self.down[level].downsample = _SpaceDownsample(here)
            if last - 2 <= level < last:
                self.down_temporal[level].downsample = _TimeDownsample(here)
        self.mid = _middle(widths[-1])
        self.norm_out = _Norm(widths[-1])
        self.conv_out = _CausalConv(nn.Conv3d, widths[-1], 2 * channels)

    def forward(self, video):
        """[B, 3, 1 + 4k, H, W] -> mean and log variance [B, 2 C, 1 + k, h, w]."""
        # three copies of the first frame in front make whole groups of four
        video = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)
        x = self.conv_in(video.contiguous(memory_format=torch.channels_last_3d))
        for space, time in zip(self.down, self.down_temporal, strict=True):
            for in_space, in_time in zip(space.block, time.block, strict=True):
                x = in_time(in_space(x))
            x = time.downsample(space.downsample(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, width, multipliers, channels):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.conv_in = _CausalConv(nn.Conv3d, channels, widths[-1])
        self.mid = _middle(widths[-1])
        self.up, self.up_temporal = nn.ModuleList(), nn.ModuleList()
        for level, (before, here) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            self.up.append(_Level(nn.Conv2d, before, here, blocks=3))
            self.up_temporal.append(_Level(nn.Conv1d, here, here, blocks=3))
            if level > 0:
                self.up[level].upsample = _SpaceUpsample(here)
            if level in (1, 2):
                self.up_temporal[level].upsample = _TimeUpsample(here)
        self.norm_out = _Norm(widths[0])
        self.conv_out = _CausalConv(nn.Conv3d, widths[0], 3)

    def forward(self, latents):
        """[B, C, 1 + k, h, w] -> [B, 3, 1 + 4k, H, W]."""
        x = self.mid(self.conv_in(latents.contiguous(memory_format=torch.channels_last_3d)))
        for space, time in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
            for in_space, in_time in zip(space.block, time.block, strict=True):
                x = in_time(in_space(x))
            x = time.upsample(space.upsample(x))
        return self.conv_out(F.silu(self.norm_out(x)))[:, :, 3:]


class _Level(nn.Module):
    """The residual blocks of one resolution, over space or over time; `_Encoder` and `_Decoder` add the resampling."""

    def __init__(self, kind, before, here, blocks):
        super().__init__()
        self.block = nn.ModuleList([_Residual(kind, here if i else before, here) for i in range(blocks)])
        self.downsample = self.upsample = nn.Identity()


def _middle(width):
    return nn.Sequential(
        OrderedDict(
            block_1=_Residual(nn.Conv3d, width, width),
            attn_1=_Attention(width),
            block_2=_Residual(nn.Conv3d, width, width),
        )
    )


class _Residual(nn.Module):
    def __init__(self, kind, before, here):
        super().__init__()
        self.norm1, self.conv1 = _Norm(before), _conv(kind, before, here)
        self.norm2, self.conv2 = _Norm(here), _conv(kind, here, here)
        self.nin_shortcut = nn.Identity() if before == here else _conv(kind, before, here, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    """One head over the h * w positions of each frame."""

    def __init__(self, width):
        super().__init__()
        self.norm = _Norm(width)
        self.q, self.k, self.v, self.proj_out = (_CausalConv(nn.Conv3d, width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # [B, T, h * w, C]
        q, k, v = (layer(h).permute(0, 2, 3, 4, 1).flatten(2, 3) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[3:])
        return x + self.proj_out(out.permute(0, 4, 1, 2, 3))


class _Norm(nn.Module):
    """LayerNorm over channels."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def _conv(kind, before, here, size=3):
    if kind is nn.Conv2d:
        return _SpaceConv(before, here, size, padding=size // 2)
    return _CausalConv(kind, before, here, size)


class _SpaceConv(nn.Conv2d):
    """A 2-D convolution of every frame."""

    def forward(self, x):
        stride, padding = (1, *self.stride), (0, *self.padding)
        return F.conv3d(x, self.weight[:, :, None], self.bias, stride, padding)


class _CausalConv(nn.Module):
    """A convolution over time (Conv1d) or over time and space (Conv3d) that sees no later frame; zeros come before."""

    def __init__(self, kind, before, here, size=3, time_stride=1):
        super().__init__()
        self.conv = kind(before, here, size)
        self.time_stride, self.padding = time_stride, (size // 2 if kind is nn.Conv3d else 0)

    def forward(self, x):
        weight = self.conv.weight if self.conv.weight.ndim == 5 else self.conv.weight[..., None, None]
        x = F.pad(x, (0, 0, 0, 0, weight.shape[2] - self.time_stride, 0))
        padding = (0, self.padding, self.padding)
        return F.conv3d(x, weight, self.conv.bias, (self.time_stride, 1, 1), padding)


class _SpaceDownsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = _SpaceConv(width, width, 3, stride=2)

    def forward(self, x):
        # zeros on the far side only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _SpaceUpsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = _SpaceConv(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class _TimeDownsample(nn.Module):
    """sigmoid(mix_factor) of the mean of three frames, stride 2, and the rest of a strided causal convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = _CausalConv(nn.Conv3d, width, width, time_stride=2)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        padded = F.pad(x, (0, 0, 0, 0, 1, 0))
        mean = (padded[:, :, :-1:2] + padded[:, :, 1::2] + padded[:, :, 2::2]) / 3
        return torch.lerp(self.conv(x), mean, torch.sigmoid(self.mix_factor))


class _TimeUpsample(nn.Module):
    """Every frame twice, mixed with a causal convolution of that."""

    def __init__(self, width):
        super().__init__()
        self.conv = _CausalConv(nn.Conv3d, width, width)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        x = F.interpolate(x, scale_factor=(2, 1, 1), mode="nearest")
        return torch.lerp(self.conv(x), x, torch.sigmoid(self.mix_factor))

"""VidTok, the published latent codec of VideoFlexTok: `vidtok_kl_causal_488_16chn` (arXiv 2412.13061).

A causal 3-D convolutional autoencoder: 17 x 128 x 128 pixels become 5 x 16 x 16 latents of 16 channels. Parameter names
are the published ones. Time is padded with zeros on the left and upsampled by repetition, as the published inference
code does; later VidTok releases repeat the first frame and interpolate instead, and give other values.

Activations are [B, T, H, W, C]. No frame sees a later one, so a clip may be computed in pieces of a few latent frames.
"""

import torch
import torch.nn.functional as F
from torch import nn

from flexkernels import norm_silu

from .codec import VIDTOK, Codec
from .convolution import Convolution, State, native


class VidTokCodec(Codec):
    """The published network. `width` 128 and `multipliers` (1, 2, 4, 4) are those of the released weights.

    Latents are the posterior mean, unscaled; `encode(video, generator)` samples the posterior. Weights may be float32,
    bfloat16 or float16: the network computes in their dtype.

    latent_frames: how many latent frames are computed at a time, where memory is to be bounded; None is all. The
    convolutions keep the last frames that they have seen, so the result is that of the whole clip, up to rounding.
    """

    name = VIDTOK

    def __init__(self, width: int = 128, multipliers: tuple[int, ...] = (1, 2, 4, 4), channels: int = 16):
        super().__init__()
        self.channels = channels
        self.latent_frames: int | None = None
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
        # a latent frame is four frames, the first one is one
        moments = self._in_pieces(self.vidtok.encoder, video, 1, self.temporal_stride)
        mean, log_variance = moments.float().permute(0, 4, 1, 2, 3).chunk(2, 1)
        if generator is None:
            return mean.contiguous()
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        return mean + noise * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def _decode(self, latents):
        video = self._in_pieces(self.vidtok.decoder, latents, 1, 1)
        return video.permute(0, 4, 1, 2, 3).contiguous()

    def _in_pieces(self, network, x, first, each):
        """The network on [B, C, T, H, W]; T is `first` frames for one latent frame and `each` for any other."""
        x = x.permute(0, 2, 3, 4, 1).to(self._dtype()).contiguous()
        if self.latent_frames is None:
            return network(x)
        if self.latent_frames < 1:
            raise ValueError(f"latent_frames must be None or at least 1, got {self.latent_frames}")
        state, step = State(), self.latent_frames * each
        pieces = [x[:, : first + step - each], *x[:, first + step - each :].split(step, 1)]
        return torch.cat([network(piece, state) for piece in pieces if piece.shape[1]], 1)

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
        self.mid = _Middle(widths[-1])
        self.norm_out = _Norm(widths[-1])
        self.conv_out = _CausalConv(nn.Conv3d, widths[-1], 2 * channels)

    def forward(self, video, state=None):
        """[B, 1 + 4k, H, W, 3] -> mean and log variance [B, 1 + k, h, w, 2 C]; with a state that has seen frames, the
        4k that follow -> k."""
        return self.finish(self.local(video, state), state)

    def local(self, video, state=None):
        """What sees a neighbourhood of pixels: -> [B, t, h, w, 4 width]."""
        if not state:
            # three copies of the first frame in front make whole groups of four
            video = torch.cat([video[:, :1].expand(-1, 3, -1, -1, -1), video], 1)
        x = self.conv_in(video, state=state)
        for space, time in zip(self.down, self.down_temporal, strict=True):
            for in_space, in_time in zip(space.block, time.block, strict=True):
                x = in_time(in_space(x, state), state)
            x = time.downsample(space.downsample(x), state=state)
        return x

    def finish(self, x, state=None):
        """What sees whole frames."""
        return self.conv_out(self.norm_out.silu(self.mid(x, state)), state=state)


class _Decoder(nn.Module):
    def __init__(self, width, multipliers, channels):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.conv_in = _CausalConv(nn.Conv3d, channels, widths[-1])
        self.mid = _Middle(widths[-1])
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

    def forward(self, latents, state=None):
        """[B, 1 + k, h, w, C] -> [B, 1 + 4k, H, W, 3]; with a state that has seen frames, the k that follow -> 4k."""
        # of the first latent frame's group of four, three frames stand for nothing
        first = 0 if state else 3
        return self.local(self.start(latents, state), state)[:, first:]

    def start(self, latents, state=None):
        """What sees whole frames: -> [B, t, h, w, 4 width]."""
        return self.mid(self.conv_in(latents, state=state), state)

    def local(self, x, state=None):
        """What sees a neighbourhood of latents: -> [B, 4t, H, W, 3]."""
        for space, time in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
            for in_space, in_time in zip(space.block, time.block, strict=True):
                x = in_time(in_space(x, state), state)
            x = time.upsample(space.upsample(x), state=state)
        return self.conv_out(self.norm_out.silu(x), state=state)


class _Same(nn.Identity):
    def forward(self, x, state=None):
        return x


class _Level(nn.Module):
    """The residual blocks of one resolution, over space or over time; `_Encoder` and `_Decoder` add the resampling."""

    def __init__(self, kind, before, here, blocks):
        super().__init__()
        self.block = nn.ModuleList([_Residual(kind, here if i else before, here) for i in range(blocks)])
        self.downsample = self.upsample = _Same()


class _Middle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block_1 = _Residual(nn.Conv3d, width, width)
        self.attn_1 = _Attention(width)
        self.block_2 = _Residual(nn.Conv3d, width, width)

    def forward(self, x, state=None):
        return self.block_2(self.attn_1(self.block_1(x, state)), state)


class _Residual(nn.Module):
    def __init__(self, kind, before, here):
        super().__init__()
        self.norm1, self.conv1 = _Norm(before), _conv(kind, before, here)
        self.norm2, self.conv2 = _Norm(here), _conv(kind, here, here)
        self.nin_shortcut = _Same() if before == here else _conv(kind, before, here, 1)

    def forward(self, x, state=None):
        h = self.conv1(self.norm1.silu(x), state=state)
        return self.conv2(self.norm2.silu(h), self.nin_shortcut(x), state)


class _Attention(nn.Module):
    """One head over the h * w positions of each frame."""

    # scores that are in memory at a time
    SCORES = 1 << 26

    def __init__(self, width):
        super().__init__()
        self.norm = _Norm(width)
        self.q, self.k, self.v, self.proj_out = (_CausalConv(nn.Conv3d, width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # [B * T, 1, h * w, C]
        q, k, v = (layer(h).flatten(2, 3).flatten(0, 1)[:, None] for layer in (self.q, self.k, self.v))
        frames = [F.scaled_dot_product_attention(*part) for part in self._parts(q, k, v)]
        rows = torch.cat(frames, 2) if len(frames) > 1 else frames[0]
        return self.proj_out(rows.view(x.shape), x)

    def _parts(self, q, k, v):
        # some queries at a time
        count = max(1, self.SCORES // (len(q) * k.shape[2]))
        return [(part, k, v) for part in q.split(count, 2)]


class _Norm(nn.Module):
    """LayerNorm over channels."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.norm(x)

    def silu(self, x):
        if not native(x):
            return F.silu(self.norm(x))
        return norm_silu(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)


def _conv(kind, before, here, size=3):
    return _SpaceConv(before, here, size) if kind is nn.Conv2d else _CausalConv(kind, before, here, size)


class _SpaceConv(Convolution, nn.Conv2d):
    """A 2-D convolution of every frame."""

    def __init__(self, before, here, size, **options):
        super().__init__(before, here, size)
        self.options = options

    def taps(self):
        return self.weight[:, :, None], self.bias


class _CausalConv(Convolution):
    """A convolution over time (Conv1d) or over time and space (Conv3d) that sees no later frame; zeros come before."""

    def __init__(self, kind, before, here, size=3):
        super().__init__()
        self.conv = kind(before, here, size)

    def taps(self):
        weight = self.conv.weight
        return weight if weight.ndim == 5 else weight[..., None, None], self.conv.bias


class _SpaceDownsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = _SpaceConv(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(x)


class _SpaceUpsample(nn.Module):
    """A convolution of every pixel twice in both directions."""

    def __init__(self, width):
        super().__init__()
        self.conv = _SpaceConv(width, width, 3, upsample=True)

    def forward(self, x):
        return self.conv(x)


class _TimeDownsample(Convolution):
    """sigmoid(mix_factor) of the mean of three frames, stride 2, and the rest of a strided causal convolution: together
    one convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = _CausalConv(nn.Conv3d, width, width)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.options = {"time_stride": 2}

    def taps(self):
        mean = _centre(self.conv.conv.weight, 1 / 3)
        return _mixed(self.conv.conv, mean, torch.sigmoid(self.mix_factor))


class _TimeUpsample(Convolution):
    """Every frame twice, mixed with a causal convolution of that: two convolutions of the frames as they are, since the
    first of two equal frames sees itself and twice the one before, the second itself twice and the one before."""

    def __init__(self, width):
        super().__init__()
        self.conv = _CausalConv(nn.Conv3d, width, width)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.options = {"phases": 2}

    def taps(self):
        same = _centre(self.conv.conv.weight, 1.0)
        same[:, :, :2] = 0
        weight, bias = _mixed(self.conv.conv, same, torch.sigmoid(self.mix_factor))
        first, second, third = weight.unbind(2)
        folded = torch.cat([torch.stack([first + second, third], 2), torch.stack([first, second + third], 2)])
        return folded, bias.repeat(2)


def _centre(weight, value):
    """A convolution of weight's shape that gives `value` times the pixel of each of its frames."""
    made = torch.zeros_like(weight)
    made[..., 1, 1] = value * torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)[..., None]
    return made


def _mixed(conv, other, share):
    """Weight and bias of the convolution with its `share` replaced by `other`."""
    wide = torch.promote_types(other.dtype, torch.float32)
    weight = torch.lerp(conv.weight.to(wide), other.to(wide), share.to(wide))
    return weight.to(other.dtype), conv.bias * (1 - share)

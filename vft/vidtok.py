"""VidTok, the published latent codec of VideoFlexTok: `vidtok_kl_causal_488_16chn` (arXiv 2412.13061).

A causal 3-D convolutional autoencoder: 17 x 128 x 128 pixels become 5 x 16 x 16 latents of 16 channels. Parameter names
are the published ones. Time is padded with zeros on the left and upsampled by repetition, as the published inference
code does; later VidTok releases repeat the first frame and interpolate instead, and give other values.

Activations are [B, T, H, W, C]. No frame sees a later one, so a clip may be computed in pieces of a few latent frames.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from flexkernels import norm_silu

from . import tiling
from .codec import VIDTOK, Codec
from .convolution import Convolution, State, by_triton, convolutions, native
from .tiling import Stage


class VidTokCodec(Codec):
    """The published network. `width` 128 and `multipliers` (1, 2, 4, 4) are those of the released weights.

    Latents are the posterior mean, unscaled; `encode(video, generator)` samples the posterior. Weights may be float32,
    bfloat16 or float16: the network computes in their dtype.

    latent_frames: how many latent frames are computed at a time, where memory is to be bounded; None is all. The
    convolutions keep the last frames that they have seen.
    tile: the side, in latents, of the squares that the picture is computed in; None is all of it. Norms are over the
    channels of a pixel, and attention, over the positions of a frame, is in the layers of latent size: these see whole
    frames. All others see a neighbourhood, 13 latents far in the decoder and 8 in the encoder, that is computed with a
    tile.
    memory: bytes that a call may take beyond the weights and what it is given: results, activations and the layout that
    weights are prepared to. It chooses the other two and takes the samples of a batch one by one; None is no limit. The
    count is that of our kernels, float32 on a CPU; workspaces of other libraries may add to it.

    In any of these ways the result is that of the whole clip at once, up to rounding.
    """

    name = VIDTOK

    def __init__(self, width: int = 128, multipliers: tuple[int, ...] = (1, 2, 4, 4), channels: int = 16):
        super().__init__()
        self.channels = channels
        self.latent_frames: int | None = None
        self.tile: int | None = None
        self.memory: int | None = None
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

    def plan_encode(self, batch: int, frames: int, height: int, width: int) -> tiling.Plan:
        """How ``memory`` has a batch of clips encoded; the sizes are those of the latents.

        Raises ValueError where ``memory`` does not suffice, or a setting is below 1.
        """
        return self._plan(tiling.encode_bytes, self.vidtok.encoder, batch, (frames, height, width))

    def plan_decode(self, batch: int, frames: int, height: int, width: int) -> tiling.Plan:
        """The same of decoding."""
        return self._plan(tiling.decode_bytes, self.vidtok.decoder, batch, (frames, height, width))

    def _plan(self, count, network, batch, size):
        for name in ("latent_frames", "tile", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, got {value}")
        if self.memory is None:
            return tiling.Plan(self.latent_frames, self.tile)
        weight = self._weight()
        for conv in convolutions(network):
            conv.prepare(native(weight))
        # what the other network's are prepared to stays, too
        prepared = sum(conv.prepared_bytes() for conv in convolutions(self))
        return tiling.choose(self.memory, prepared, size, partial(count, network, batch, size, weight))

    def _encode(self, video, generator):
        network, (batch, _, *pixels) = self.vidtok.encoder, video.shape
        _, frames, height, width = self.latent_shape(*pixels)
        plan = self.plan_encode(batch, frames, height, width)
        moments = self._weight().new_empty(batch, frames, height, width, 2 * self.channels)
        for sample in self._samples(batch):
            x = self._channels_last(video[sample])
            hidden = x.new_empty(len(x), frames, height, width, network.width)
            for tile in tiling.tiles(network.stages(), height, width, plan.tile, up=False):
                local = partial(network.local, tile=tile)
                # a latent frame is four frames, the first one is one
                _into(hidden[tile.target], _pieces(local, x[tile.source], 1, self.temporal_stride, plan.latent_frames))
            _into(moments[sample], _pieces(network.finish, hidden, 1, 1, plan.latent_frames))
        mean, log_variance = moments.float().permute(0, 4, 1, 2, 3).chunk(2, 1)
        if generator is None:
            return mean.contiguous()
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        return mean + noise * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def _decode(self, latents):
        network, (batch, _, frames, height, width) = self.vidtok.decoder, latents.shape
        plan = self.plan_decode(batch, frames, height, width)
        pixels = 1 + (frames - 1) * self.temporal_stride, height * self.spatial_stride, width * self.spatial_stride
        video = latents.new_empty(batch, 3, *pixels, dtype=torch.float32)
        for sample in self._samples(batch):
            x = self._channels_last(latents[sample])
            hidden = x.new_empty(len(x), frames, height, width, network.width)
            _into(hidden, _pieces(network.start, x, 1, 1, plan.latent_frames))
            shown = video[sample].permute(0, 2, 3, 4, 1)
            for tile in tiling.tiles(network.stages(), height, width, plan.tile, up=True):
                local = partial(network.local, tile=tile)
                _into(shown[tile.target], _pieces(local, hidden[tile.source], 1, 1, plan.latent_frames))
        return video

    def _samples(self, batch):
        """Slices of a batch that are computed together."""
        step = batch if self.memory is None else 1
        return [slice(i, i + step) for i in range(0, batch, max(step, 1))]

    def _channels_last(self, x):
        return x.permute(0, 2, 3, 4, 1).to(self._weight().dtype).contiguous()

    def _weight(self):
        return self.vidtok.encoder.conv_in.conv.weight


def _pieces(network, x, first, each, count):
    """The network on `count` latent frames of [B, T, H, W, C] at a time, one after the other; None: on all.

    T is `first` frames for one latent frame and `each` for any other.
    """
    if count is None:
        yield network(x)
        return
    state, step = State(), count * each
    for piece in (x[:, : first + step - each], *x[:, first + step - each :].split(step, 1)):
        if piece.shape[1]:
            yield network(piece.contiguous(), state)


def _into(out, pieces):
    at = 0
    for piece in pieces:
        out[:, at : at + piece.shape[1]] = piece
        at += piece.shape[1]


def _check_keys(what, keys):
    if keys:
        names = sorted(keys)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"state_dict must hold the VidTok weights, got {what} keys {', '.join(names[:4])}{more}")


class _Encoder(nn.Module):
    def __init__(self, width, multipliers, channels):
        super().__init__()
        widths, last = [width * m for m in multipliers], len(multipliers) - 1
        self.width = widths[-1]
        self.conv_in = _CausalConv(nn.Conv3d, 3, width)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        for level, (before, here) in enumerate(zip([width, *widths], widths, strict=False)):
            self.down.append(_Level(nn.Conv2d, before, here, blocks=2))
            self.down_temporal.append(_Level(nn.Conv1d, here, here, blocks=2))
            if level < last:
                self.down[level].downsample = _Resample(here, stride=2)
            if last - 2 <= level < last:
                self.down_temporal[level].downsample = _TimeDownsample(here)
        self.mid = _Middle(widths[-1])
        self.norm_out = _Norm(widths[-1])
        self.conv_out = _CausalConv(nn.Conv3d, widths[-1], 2 * channels)

    def forward(self, video):
        """[B, 1 + 4k, H, W, 3] -> mean and log variance [B, 1 + k, h, w, 2 C]."""
        return self.finish(self.local(video))

    def local(self, video, state=None, tile=None):
        """What sees a neighbourhood of pixels: -> [B, 1 + k, h, w, width]; with a state that has seen frames, the k."""
        if not state:
            # three copies of the first frame in front make whole groups of four
            video = torch.cat([video[:, :1].expand(-1, 3, -1, -1, -1), video], 1)
        return tiling.run(self.stages(), video, state, tile)

    def stages(self):
        stages, layers = [], [self.conv_in]
        for space, time in zip(self.down, self.down_temporal, strict=True):
            layers += _alternating(space, time)
            last = space is self.down[-1]
            stages.append(Stage(layers, None if last else space.downsample.conv))
            layers = [time.downsample]
        return stages

    def finish(self, x, state=None):
        """What sees whole frames."""
        return tiling.run([Stage(self.whole())], x, state)

    def whole(self):
        return [*self.mid.layers(), self.norm_out.silu, self.conv_out]


class _Decoder(nn.Module):
    def __init__(self, width, multipliers, channels):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.width = widths[-1]
        self.conv_in = _CausalConv(nn.Conv3d, channels, widths[-1])
        self.mid = _Middle(widths[-1])
        self.up, self.up_temporal = nn.ModuleList(), nn.ModuleList()
        for level, (before, here) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            self.up.append(_Level(nn.Conv2d, before, here, blocks=3))
            self.up_temporal.append(_Level(nn.Conv1d, here, here, blocks=3))
            if level > 0:
                self.up[level].upsample = _Resample(here, upsample=True)
            if level in (1, 2):
                self.up_temporal[level].upsample = _TimeUpsample(here)
        self.norm_out = _Norm(widths[0])
        self.conv_out = _CausalConv(nn.Conv3d, widths[0], 3)

    def forward(self, latents):
        """[B, 1 + k, h, w, C] -> [B, 1 + 4k, H, W, 3]."""
        return self.local(self.start(latents))

    def start(self, latents, state=None):
        """What sees whole frames: -> [B, 1 + k, h, w, width]; with a state that has seen frames, the k that follow."""
        return tiling.run([Stage(self.whole())], latents, state)

    def whole(self):
        return [self.conv_in, *self.mid.layers()]

    def local(self, x, state=None, tile=None):
        """What sees a neighbourhood of latents: -> [B, 1 + 4k, H, W, 3]; with a state that has seen frames, the 4k."""
        # of the first latent frame's group of four, three frames stand for nothing
        first = 0 if state else 3
        return tiling.run(self.stages(), x, state, tile)[:, first:]

    def stages(self):
        stages, layers = [], []
        for space, time in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
            layers += _alternating(space, time)
            if space is self.up[0]:
                return [*stages, Stage([*layers, self.norm_out.silu, self.conv_out])]
            stages.append(Stage(layers, space.upsample.conv))
            layers = [time.upsample]


def _alternating(space, time):
    return [block for pair in zip(space.block, time.block, strict=True) for block in pair]


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

    def layers(self):
        return [self.block_1, self.attn_1, self.block_2]


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

    def __init__(self, width):
        super().__init__()
        self.norm = _Norm(width)
        self.q, self.k, self.v, self.proj_out = (_CausalConv(nn.Conv3d, width, width, 1) for _ in range(4))

    def forward(self, x, state=None):
        # [B * T, 1, h * w, C]
        q, k, v = self._projected(x)
        rows = torch.empty_like(q)
        # some queries at a time
        count = max(1, tiling.SCORES // (len(q) * k.shape[2]))
        for out, part in zip(rows.split(count, 2), q.split(count, 2), strict=True):
            out.copy_(F.scaled_dot_product_attention(part, k, v))
        del q, k, v
        return self.proj_out(rows.view(x.shape), x)

    def _projected(self, x):
        h = self.norm(x)
        return [layer(h).flatten(2, 3).flatten(0, 1)[:, None] for layer in (self.q, self.k, self.v)]


class _Norm(nn.Module):
    """LayerNorm over channels."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.norm(x)

    def silu(self, x, state=None):
        if not (native(x) or by_triton(x)):
            return F.silu(self.norm(x))
        return norm_silu(x, self.norm.weight.float(), self.norm.bias.float(), eps=self.norm.eps)


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


class _Resample(nn.Module):
    """A convolution of every second pixel (stride=2), or of every pixel twice (upsample=True), in both directions."""

    def __init__(self, width, **options):
        super().__init__()
        self.conv = _SpaceConv(width, width, 3, **options)


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

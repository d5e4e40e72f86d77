"""The convolutions of a video codec on channels-last activations [B, T, H, W, C]: prepared once, causal in time.

On a CPU in float32 they are :func:`flexkernels.causal_conv`. Elsewhere they are PyTorch's, which pads on both sides
alike: what a padding too many computes is cut away as a view, so nothing is copied to pad it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import flexkernels
from flexkernels.library import current_backend


class State(dict):
    """The frames that each convolution has seen last, so that the next frames of a clip continue from them."""

    def turn(self, conv: nn.Module, x: torch.Tensor, frames: int) -> torch.Tensor | None:
        """The ``frames`` before x, None for zeros; x's last ones take their place."""
        past = self.get(conv)
        if x.shape[1] < frames:
            before = x.new_zeros(x.shape[0], frames, *x.shape[2:]) if past is None else past
            self[conv] = torch.cat([before[:, x.shape[1] :], x], 1)
        elif frames:
            self[conv] = x[:, x.shape[1] - frames :].clone()
        return past


class Convolution(nn.Module):
    """A module whose :meth:`taps` say what it computes.

    taps() -> weight [phases * outputs, C, time, height, width] and bias; ``options`` are those of
    :func:`flexkernels.prepare_conv`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.options: dict = {}
        self._made = None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, state: State | None = None
    ) -> torch.Tensor:
        prepared = self.prepare(native(x))
        past = None if state is None else state.turn(self, x, prepared.taps[0] - prepared.time_stride)
        if isinstance(prepared, Plain):
            return prepared(x, residual, past)
        return flexkernels.causal_conv(x, prepared, residual=residual, past=past)

    def prepare(self, ours: bool):
        """What the weights are laid out to, for our kernels or for PyTorch's; kept until they change."""
        parameters = list(self.parameters())
        key = [ours, *map(id, parameters), *(0 if p.is_inference() else p._version for p in parameters)]
        if self._made is None or self._made[0] != key:
            weight, bias = self.taps()
            make = flexkernels.prepare_conv if ours else Plain.prepare
            # with the parameters, so that their ids stay theirs
            self._made = key, parameters, make(weight, bias, **self.options)
        return self._made[2]

    def prepared_bytes(self) -> int:
        """Of what is prepared and is no view of the weights."""
        if self._made is None:
            return 0
        _, parameters, made = self._made
        known = {p.untyped_storage().data_ptr() for p in parameters}
        storages = [t.untyped_storage() for t in (made.weight, made.bias) if t is not None]
        return sum(s.nbytes() for s in storages if s.data_ptr() not in known)

    def _apply(self, *args, **kwargs):
        # another device or dtype
        self._made = None
        return super()._apply(*args, **kwargs)


def convolutions(module: nn.Module) -> list[Convolution]:
    """The convolutions in a module that are computed; those inside another are part of it."""
    if isinstance(module, Convolution):
        return [module]
    return [conv for child in module.children() for conv in convolutions(child)]


def native(x: torch.Tensor) -> bool:
    """Whether our kernels serve x."""
    cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return cpu and current_backend() in ("auto", "cpu") and flexkernels.available_backends()["cpu"] is None


def by_triton(x: torch.Tensor) -> bool:
    """Whether our Triton kernels serve x."""
    return x.is_cuda and current_backend() in ("auto", "triton") and flexkernels.available_backends()["triton"] is None


@dataclass(frozen=True)
class Plain:
    """The same in PyTorch's convolutions; weight as in ``taps``, or for ``upsample`` [4 * outputs, C, t, 2, 2]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    taps: tuple[int, int, int]
    time_stride: int
    stride: int
    phases: int
    upsample: bool

    @classmethod
    def prepare(cls, weight, bias=None, *, time_stride=1, stride=1, phases=1, upsample=False) -> Plain:
        taps = tuple(weight.shape[2:])
        if upsample:
            weight, bias = _folded(weight), bias.repeat(4)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return cls(weight, bias, taps, time_stride, stride, phases, upsample)

    def __call__(self, x, residual=None, past=None) -> torch.Tensor:
        if self.taps == (1, 1, 1) and self.stride == 1:
            y = F.linear(x, self.weight.flatten(1), self.bias)
        elif self.upsample:
            y = self._upsampled(x)
        elif self.taps[0] == 1:
            y = self._in_space(x)
        else:
            y = self._in_time(x, past)
        return y if residual is None else residual + y

    def _in_space(self, x):
        # [B * T, C, H, W] in channels-last memory, a view
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        # with a stride the far side alone is padded: of two zeros on both sides the first outputs are cut away
        padding = [n // 2 if self.stride == 1 else self.stride for n in self.taps[1:]]
        y = F.conv2d(frames, self.weight[:, :, 0], self.bias, self.stride, padding)
        y = y if self.stride == 1 else y[:, :, 1:, 1:]
        return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])

    def _in_time(self, x, past):
        _, frames, height, width, _ = x.shape
        before = self.taps[0] - self.time_stride
        x = x if past is None else torch.cat([past, x], 1)
        pad = before if past is None else 0
        if self.taps[1:] == (1, 1):
            # [B, C, T, H * W] in channels-last memory
            rows = x.flatten(2, 3).permute(0, 3, 1, 2)
            y = F.conv2d(rows, self.weight[..., 0], self.bias, (self.time_stride, 1), (pad, 0))
            y = y.unflatten(3, (height, width))
        else:
            padding = (pad, self.taps[1] // 2, self.taps[2] // 2)
            y = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, self.bias, (self.time_stride, 1, 1), padding)
        # [B, t, h, w, phases * outputs]; frames that saw zeros behind the last one are cut away
        y = y.permute(0, 2, 3, 4, 1)[:, : frames // self.time_stride]
        if self.phases > 1:
            y = y.unflatten(4, (self.phases, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        return y

    def _upsampled(self, x):
        """Each of the 2 x 2 pixels that a pixel becomes is a convolution of 2 x 2 taps."""
        height, width = x.shape[2:4]
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        y = F.conv2d(frames, self.weight[:, :, 0], self.bias, padding=1).permute(0, 2, 3, 1).unflatten(3, (4, -1))
        out = y.new_empty(len(y), height, 2, width, 2, y.shape[-1])
        for i in range(2):
            for j in range(2):
                out[:, :, i, :, j] = y[:, i : i + height, j : j + width, 2 * i + j]
        return out.flatten(3, 4).flatten(1, 2).unflatten(0, x.shape[:2])


def _folded(weight: torch.Tensor) -> torch.Tensor:
    """[O, C, 1, 3, 3] behind a repetition of every pixel -> [4 O, C, 1, 2, 2], the four pixels one after the other."""
    # pixel 0 sees a - 1, a, a and pixel 1 sees a, a, a + 1 where both come from a
    fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    folded = torch.einsum("iay,jbx,octyx->ijoctab", fold, fold, weight.float())
    return folded.flatten(0, 2).to(weight.dtype)

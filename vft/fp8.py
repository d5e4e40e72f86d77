"""Products of fp8 (e4m3) matrices: both sides are rounded row by row, with a float32 scale each.

W = round(W / scale), scale = max |W| / 448 for each output; x likewise for each row of a call. In bfloat16 on GPUs that
multiply fp8 this is `torch._scaled_mm`, elsewhere the same rounding and a product of what it left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

FP8 = torch.float8_e4m3fn
LARGEST = 448
# of a row of zeros
SMALLEST_SCALE = 1e-30
# of GPUs that multiply it
CAPABILITY = (8, 9)


def check_device(device: torch.device | str | None) -> None:
    """Raises ValueError for a GPU that does not multiply fp8."""
    if device is not None and torch.device(device).type == "cuda":
        have = torch.cuda.get_device_capability(device)
        if have < CAPABILITY:
            need, have = (".".join(map(str, each)) for each in (CAPABILITY, have))
            raise ValueError(f"weights 'fp8' needs a GPU of compute capability {need}, got {have}")


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[m, k]`` as fp8, and the float32 scale ``[m, 1]`` of each row."""
    largest = torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x / scale).to(FP8), scale


def widen(rounded: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What :func:`round_rows` left, in another dtype."""
    return (rounded.float() * scale).to(dtype)


def multiplies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the device multiplies such matrices as fp8: its products of rows with scales have bfloat16 results and
    sides that are multiples of 16."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and not any(side % 16 for side in weight.shape)


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias where the device multiplies fp8; weight fp8 ``[n, k]``, scale float32 ``[n]``."""
    rounded, scale_x = round_rows(x)
    out = torch._scaled_mm(rounded, weight.T, scale_x, scale[None], out_dtype=x.dtype)
    return out if bias is None else out + bias


class Fp8Linear(nn.Module):
    """A linear layer x ``[m, k]`` -> x W^T + bias ``[m, n]`` of rounded weights, which keep their dtype whatever the
    module is cast to."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        rounded, scale = round_rows(weight.detach())
        self.register_buffer("weight", rounded, persistent=False)
        self.register_buffer("scale", scale[:, 0], persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _apply(self, fn, recurse=True):
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        self.weight, self.scale = (t.to(self.weight.device) for t in (weight, scale))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if multiplies(x, self.weight):
            return product(x, self.weight, self.scale, self.bias)
        return F.linear(widen(*round_rows(x), x.dtype), widen(self.weight, self.scale[:, None], x.dtype), self.bias)

"""The head over 64,000 tokens for one to four sequences, and a small layer, where the overhead shows."""

import torch
from peers import linear as linear_peers

import flexkernels

from .case import Case, accurate, case, size


def linear_case(device: str, dtype, n: int, k: int, rows=2, int8=False, activation=None) -> Case:
    x, weight, scale = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), None
    if int8:
        weight, scale = flexkernels.quantize_rows(weight)
    x, weight = x.to(device), weight.to(device)
    scale = None if scale is None else scale.to(device)
    settings = {"activation": activation, "weight_scale": scale}

    def peer():
        if int8:
            return linear_peers.dequantized_linear(x, weight, scale)
        return linear_peers.swiglu(x, weight) if activation else linear_peers.linear(x, weight)

    def ours():
        return flexkernels.skinny_linear(x, weight, **settings)

    def check():
        wide = weight if int8 else weight.double()
        exact = settings | {"weight_scale": None if scale is None else scale.double()}
        return accurate(ours(), peer(), flexkernels.skinny_linear_ref(x.double(), wide, **exact))

    note = "int8 weight" if int8 else activation or ""
    flops = 2 * rows * weight.numel()
    moved = size(x, weight, ours())
    others = {"torch linear": peer}
    if int8 or activation:
        wide = weight.to(dtype)
        others["F.linear alone"] = lambda: linear_peers.linear(x, wide)
    return Case(dtype, [rows, n, k], ours, others, check, moved, flops, note, bandwidth="read")


def add_head(rows: int, dtype: torch.dtype, suffix: str):
    name = "head" if rows == 2 else f"head_rows{rows}"
    case(f"skinny_linear_{name}_{suffix}")(lambda device: linear_case(device, dtype, 64_000, 1024, rows))


for count in (1, 2, 3, 4):
    add_head(count, torch.float32, "fp32")
    add_head(count, torch.bfloat16, "bf16")


@case("skinny_linear_head_int8")
def head_int8(device: str) -> Case:
    return linear_case(device, torch.bfloat16, 64_000, 1024, int8=True)


@case("skinny_linear_small_bf16")
def small_bf16(device: str) -> Case:
    return linear_case(device, torch.bfloat16, 1920, 640)


@case("skinny_linear_swiglu_bf16")
def swiglu_bf16(device: str) -> Case:
    return linear_case(device, torch.bfloat16, 3456, 640, activation="swiglu")


@case("skinny_linear_normed_bf16")
def normed_bf16(device: str) -> Case:
    """q, k and v of a block of the generator: its RMS norm and its linear layer, in one call and in two."""
    x, norm, weight = torch.randn(2, 1024), 1 + torch.randn(1024) / 8, torch.randn(3072, 1024) / 32
    x, norm, weight = (t.to(torch.bfloat16).to(device) for t in (x, norm, weight))

    def ours():
        return flexkernels.skinny_linear(x, weight, norm_weight=norm)

    def two():
        return flexkernels.skinny_linear(flexkernels.rms_norm(x, norm), weight)

    def peer():
        return linear_peers.normed_linear(x, norm, weight)

    def check():
        exact = flexkernels.skinny_linear_ref(x.double(), weight.double(), norm_weight=norm.double())
        return accurate(ours(), peer(), exact)

    others, flops, moved = (
        {"torch linear": peer, "two calls": two},
        2 * 2 * weight.numel(),
        size(x, norm, weight, ours()),
    )
    return Case(torch.bfloat16, [2, 3072, 1024], ours, others, check, moved, flops, "normed", bandwidth="read")

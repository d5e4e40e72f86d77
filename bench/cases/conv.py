"""Convolutions of VidTok at full and at quarter resolution, and the norm before them."""

import torch
from peers import conv as conv_peers

import flexkernels

from .case import Case, accurate, case, compiled, size


def conv_case(device: str, channels: int, frames: int, side: int, taps: tuple[int, int, int]) -> Case:
    x = torch.randn(1, frames, side, side, channels, device=device)
    plain = torch.randn(channels, channels, *taps, device=device) / (channels * taps[0] * taps[1] * taps[2]) ** 0.5
    weight = flexkernels.prepare_conv(plain)
    ours = lambda: flexkernels.causal_conv(x, weight)  # noqa: E731
    peer = lambda: conv_peers.causal(x, plain)  # noqa: E731

    def check():
        exact = conv_peers.causal(x[:, :4].double(), plain.double())
        # transformed tiles err by a few times as much
        error = [(y[:, :4].double() - exact).norm() / exact.norm() for y in (ours(), peer())]
        return None if error[0] <= 5 * error[1] else f"error {error[0]:.3g}, of the formula {error[1]:.3g}"

    flops = 2 * x.numel() * channels * taps[0] * taps[1] * taps[2]
    shape = [frames, side, side, channels]
    note = "flops of all taps"
    return Case(torch.float32, shape, ours, {"torch conv3d": peer}, check, size(x, x, weight.weight), flops, note)


@case("causal_conv_space_fp32")
def space(device: str) -> Case:
    return conv_case(device, 128, 20, 64, (1, 3, 3))


@case("causal_conv_time_fp32")
def time(device: str) -> Case:
    return conv_case(device, 128, 20, 64, (3, 1, 1))


@case("causal_conv_wide_fp32")
def wide(device: str) -> Case:
    return conv_case(device, 512, 10, 32, (1, 3, 3))


def norm_case(device: str, dtype: torch.dtype, rows: int) -> Case:
    x, (weight, bias) = torch.randn(rows, 128, device=device, dtype=dtype), torch.randn(2, 128, device=device)
    ours = lambda: flexkernels.norm_silu(x, weight, bias)  # noqa: E731
    peer = lambda: conv_peers.norm_silu(x, weight.to(dtype), bias.to(dtype))  # noqa: E731
    exact = lambda: conv_peers.norm_silu(*(t.double() for t in (x, weight, bias)))  # noqa: E731
    check = lambda: accurate(ours(), peer(), exact())  # noqa: E731
    peers = {"layer_norm, silu": peer} | compiled(peer, device)
    return Case(dtype, list(x.shape), ours, peers, check, size(x, x), 0)


@case("norm_silu_fp32")
def norm(device: str) -> Case:
    return norm_case(device, torch.float32, 81_920)


@case("norm_silu_bf16")
def norm_bf16(device: str) -> Case:
    """A clip of 17 x 256 x 256 at full resolution on a GPU."""
    return norm_case(device, torch.bfloat16, 1_114_112 if device == "cuda" else 81_920)

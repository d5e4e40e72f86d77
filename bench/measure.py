"""Timing: contenders take turns in one process, and each is given as the median of its turns."""

import statistics
import time
from collections.abc import Callable

import torch

# one turn repeats a call until it lasts about this long
TURN_SECONDS = 0.005
FEWEST_TURNS = 7


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def turn(function: Callable, repeats: int, device: str) -> float:
    """Seconds of one call, as the mean of `repeats` in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def alternate(contenders: dict[str, Callable], device: str, seconds: float) -> dict[str, float]:
    """The median milliseconds of each contender; they take turns for about `seconds` in all."""
    repeats = {}
    for name, function in contenders.items():
        # the first call compiles, the second allocates
        function()
        function()
        synchronize(device)
        repeats[name] = max(1, round(TURN_SECONDS / max(turn(function, 1, device), 1e-9)))
    samples = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while len(next(iter(samples.values()))) < FEWEST_TURNS or time.perf_counter() < end:
        for name, function in contenders.items():
            samples[name].append(turn(function, repeats[name], device))
    return {name: 1000 * statistics.median(values) for name, values in samples.items()}


def ceilings(device: str, seconds: float = 1.0) -> dict[str, float]:
    """What this machine reaches: copy and read in GB/s (bytes read and written), matrix products in GFLOP/s."""
    count, width = (2**28, 8192) if device == "cuda" else (2**25, 1536)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    half = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    full = half.float()
    ms = alternate(
        {
            "copy": lambda: target.copy_(source),
            "read": source.sum,
            "fp32": lambda: full @ full,
            "bf16": lambda: half @ half,
        },
        device,
        seconds,
    )
    return {
        "copy_gb_s": 8 * count / ms["copy"] / 1e6,
        "read_gb_s": 4 * count / ms["read"] / 1e6,
        "gemm_fp32_gflop_s": 2 * width**3 / ms["fp32"] / 1e6,
        "gemm_bf16_gflop_s": 2 * width**3 / ms["bf16"] / 1e6,
    }


def bound_ms(bytes_moved: int, flops: int, dtype: torch.dtype, ceiling: dict[str, float]) -> float:
    """The least time of a case on this machine: moving its bytes, or its arithmetic at the speed of matrix products.

    The bytes go through memory; a case that stays in the caches can be faster, so its fraction of bound exceeds 1.
    """
    gflop_s = ceiling["gemm_fp32_gflop_s" if dtype == torch.float32 else "gemm_bf16_gflop_s"]
    return max(bytes_moved / ceiling["copy_gb_s"], flops / gflop_s) / 1e6

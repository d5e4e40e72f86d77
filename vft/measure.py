"""Timing: contenders take turns in one process; each is given as the median and the quartiles of its turns."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# one turn repeats a call until it lasts about this long
TURN_SECONDS = 0.005
# a slow case ends after the first number of turns, any other takes at least the second
FEWEST_TURNS, ENOUGH_TURNS = 3, 7
# a case is slow when this many times its seconds have not been enough
PATIENCE = 3


class Timing(NamedTuple):
    """Milliseconds of a call: the median of its turns and their lower and upper quartile."""

    ms: float
    low: float
    high: float


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
def alternate(contenders: dict[str, Callable], device: str, seconds: float) -> dict[str, Timing]:
    """The times of each contender; they take turns for about `seconds` in all."""
    repeats = {}
    for name, function in contenders.items():
        # the first call compiles, the second allocates; a slow one needs no third to be known as slow
        function()
        synchronize(device)
        once = turn(function, 1, device)
        if once < TURN_SECONDS:
            once = turn(function, 1, device)
        repeats[name] = max(1, round(TURN_SECONDS / max(once, 1e-9)))
    samples = {name: [] for name in contenders}
    start = time.perf_counter()
    while not _enough(len(next(iter(samples.values()))), time.perf_counter() - start, seconds):
        for name, function in contenders.items():
            samples[name].append(turn(function, repeats[name], device))
    return {name: _timing(values) for name, values in samples.items()}


def _enough(turns: int, elapsed: float, seconds: float) -> bool:
    fewest = FEWEST_TURNS if elapsed >= PATIENCE * seconds else ENOUGH_TURNS
    return turns >= fewest and elapsed >= seconds


def _timing(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(1000 * median, 1000 * low, 1000 * high)


def ceilings(device: str, seconds: float = 1.0) -> dict[str, float]:
    """What this machine reaches: copy and read in GB/s (bytes read and written), matrix products in GFLOP/s.

    A matrix-vector product reads faster than a sum does.
    """
    count, width = (2**28, 8192) if device == "cuda" else (2**25, 1024)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    rows, vector = source.view(-1, 1024), torch.ones(1024, device=device)
    half = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    full = half.float()
    contenders = {
        "copy": lambda: target.copy_(source),
        "read": lambda: rows @ vector,
        "fp32": lambda: full @ full,
        "bf16": lambda: half @ half,
    }
    ms = {name: timing.ms for name, timing in alternate(contenders, device, seconds).items()}
    return {
        "copy_gb_s": 8 * count / ms["copy"] / 1e6,
        "read_gb_s": 4 * count / ms["read"] / 1e6,
        "gemm_fp32_gflop_s": 2 * width**3 / ms["fp32"] / 1e6,
        "gemm_bf16_gflop_s": 2 * width**3 / ms["bf16"] / 1e6,
    }


def bound_ms(
    bytes_moved: int, flops: int, dtype: torch.dtype, ceiling: dict[str, float], bandwidth: str = "copy"
) -> float:
    """The least time of a case on this machine: moving its bytes, or its arithmetic at the speed of matrix products.

    bandwidth: "copy", or "read" for a case that writes next to nothing. The bytes go through memory; a case that stays
    in the caches can be faster, so its fraction of bound exceeds 1.
    """
    gflop_s = ceiling["gemm_fp32_gflop_s" if dtype == torch.float32 else "gemm_bf16_gflop_s"]
    return max(bytes_moved / ceiling[f"{bandwidth}_gb_s"], flops / gflop_s) / 1e6

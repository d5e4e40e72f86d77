"""Other libraries before and after `flexkernels.accelerate`: equal results, then the time of each.

    python docs/examples/speedup.py [--seconds 1.0] [--scale 1.0]

needs vector_quantize_pytorch and diffusers. Before and after take turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

import flexkernels


class Case(NamedTuple):
    """One call before and after, and the largest relative difference that its results may have."""

    name: str
    shape: list[int]
    before: Callable[[], tuple[torch.Tensor, ...]]
    after: Callable[[], tuple[torch.Tensor, ...]]
    tolerance: float


def quantizer(scale: float, dtype: torch.dtype, symmetric: bool) -> Case:
    from vector_quantize_pytorch import FSQ

    fsq = FSQ([8, 8, 8, 5, 5, 5], preserve_symmetry=symmetric)
    accelerated = flexkernels.accelerate(copy.deepcopy(fsq))
    z = torch.randn(8, max(1, round(20480 * scale)), 6).to(dtype)
    name = f"FSQ, {'symmetric, ' if symmetric else ''}{str(dtype).removeprefix('torch.')}"
    return Case(name, list(z.shape), lambda: fsq(z), lambda: accelerated(z), 0.0)


def indices(scale: float) -> Case:
    from vector_quantize_pytorch import FSQ

    fsq = FSQ([8, 8, 8, 5, 5, 5])
    accelerated = flexkernels.accelerate(copy.deepcopy(fsq))
    ids = torch.randint(fsq.codebook_size, (8, max(1, round(20480 * scale))))
    call = lambda which: (which.indices_to_codes(ids),)  # noqa: E731
    return Case("FSQ.indices_to_codes", list(ids.shape), lambda: call(fsq), lambda: call(accelerated), 0.0)


def scheduler(scale: float, dtype: torch.dtype) -> Case:
    from diffusers import FlowMatchEulerDiscreteScheduler

    before, after = (FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2))
    flexkernels.accelerate(after)
    for each in (before, after):
        each.set_timesteps(20)
    sample, velocity = torch.randn(2, 2, 16, 5, max(1, round(64 * scale)), 64).to(dtype).unbind()

    def step(which):
        # always the same step
        which.set_begin_index(5)
        which._step_index = None
        return which.step(velocity, which.timesteps[5], sample, return_dict=False)

    name = f"FlowMatchEulerDiscreteScheduler.step, {str(dtype).removeprefix('torch.')}"
    tolerance = 2 * torch.finfo(dtype).eps
    return Case(name, list(sample.shape), lambda: step(before), lambda: step(after), tolerance)


def check(case: Case) -> None:
    """Raises AssertionError where before and after differ by more than the case allows."""
    for after, before in zip(case.after(), case.before(), strict=True):
        torch.testing.assert_close(after, before, rtol=case.tolerance, atol=case.tolerance)


def measure(case: Case, seconds: float) -> tuple[float, float]:
    """Median seconds of before and after, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for call, kept in zip((case.before, case.after), times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Times of other libraries before and after flexkernels.accelerate.")
    parser.add_argument("--seconds", type=float, default=1.0, help="to measure each case for")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of elements")
    args = parser.parse_args()
    cases = [
        *(quantizer(args.scale, dtype, symmetric) for dtype in (torch.float32, torch.bfloat16) for symmetric in (0, 1)),
        indices(args.scale),
        *(scheduler(args.scale, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ]
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"{'case':<52}{'shape':<22}{'before':>10}{'after':>10}{'speed-up':>10}")
    for case in cases:
        check(case)
        before, after = measure(case, args.seconds)
        shape = " x ".join(map(str, case.shape))
        print(f"{case.name:<52}{shape:<22}{before * 1e3:>7.2f} ms{after * 1e3:>7.2f} ms{before / after:>9.1f}x")


if __name__ == "__main__":
    main()

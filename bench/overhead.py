"""What a call costs before any work: microseconds of each op on tiny tensors, with PyTorch's own beside them.

    python bench/overhead.py [--device cuda] [--json FILE]

Turns alternate in one process; a number is the median of its turns. On a GPU calls are queued without waiting, so it is
host time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import flexkernels


def calls(device: str) -> dict[str, Callable[[], object]]:
    def draw(*shape):
        return torch.randn(shape, device=device)

    x, weight, rows = draw(4, 64), draw(64), draw(2, 64)
    square = draw(64, 64)
    state, velocity = draw(1, 4, 2, 4, 4), draw(1, 4, 2, 4, 4)
    apg = flexkernels.APG(3.0)
    query, cache = draw(1, 1, 2, 32), draw(1, 2, 8, 32)
    length = torch.tensor([4], dtype=torch.int32, device=device)
    layout = flexkernels.SequenceLayout([[(4, 2)] * 2], "frame_causal", device=device)
    heads, codes, logits = draw(12, 2, 32), draw(16, 6), draw(1, 256)
    return {
        "F.rms_norm": lambda: F.rms_norm(x, (64,), weight),
        "F.linear": lambda: F.linear(x, square),
        "rms_norm": lambda: flexkernels.rms_norm(x, weight),
        "adaln_norm": lambda: flexkernels.adaln_norm(x, rows[:1], rows[1:]),
        "swiglu": lambda: flexkernels.swiglu(x),
        "fsq_quantize": lambda: flexkernels.fsq_quantize(codes, (8, 8, 8, 5, 5, 5)),
        "flow_step": lambda: flexkernels.flow_step(state, velocity, velocity, dt=-0.1, guidance=apg),
        "decode_attention": lambda: flexkernels.decode_attention(query, cache, cache, length),
        "attention": lambda: flexkernels.attention(heads, heads, heads, layout),
        "skinny_linear": lambda: flexkernels.skinny_linear(x, square),
        "sample_logits": lambda: flexkernels.sample_logits(logits, seed=0, offset=0),
    }


def measure(
    made: dict[str, Callable[[], object]], device: str, turns: int = 15, repeats: int = 400
) -> dict[str, float]:
    """Median microseconds a call."""
    seen: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(turns + 1):
        for name, call in made.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seen[name].append((time.perf_counter() - start) / repeats * 1e6)
            if device != "cpu":
                torch.cuda.synchronize()
    # the first turn warms up
    return {name: statistics.median(times[1:]) for name, times in seen.items()}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(calls(options.device), options.device)
    for name, microseconds in found.items():
        print(f"{name:18} {microseconds:6.1f} us")
    if options.json:
        facts = {"device": options.device, "machine": platform.machine(), "torch": torch.__version__}
        with open(options.json, "w") as file:
            json.dump(facts | {"us_per_call": found}, file, indent=1)


if __name__ == "__main__":
    main()

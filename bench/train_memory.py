"""Peak memory of a training step above that of the loaded model, each way in a process of its own.

python bench/train_memory.py
"""

import resource
import subprocess
import sys

import torch
from cases.train import Step

WAYS = ("ours", "ours, activations recomputed", "dense-mask SDPA")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str) -> float:
    """MiB."""
    torch.manual_seed(0)
    it = Step("cpu", torch.float32)
    it.model.encoder.recompute = it.model.decoder.recompute = way == WAYS[1]
    before = peak_mib()
    for _ in range(2):
        it.step(it.plain if way == WAYS[2] else it.ours)
    return peak_mib() - before


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(f"{sys.argv[1]}: {measure(sys.argv[1]):.0f} MiB", flush=True)
    else:
        for way in WAYS:
            subprocess.run([sys.executable, __file__, way], check=True)

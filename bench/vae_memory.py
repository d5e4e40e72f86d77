"""What VidTok of published size takes for a clip of 17 x 128 x 128 on this CPU, float32: counted by its plan, and
measured as resident memory above that of the loaded weights. Each way in a process of its own.

python bench/vae_memory.py [--size 128]
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import torch

from vft.vidtok import VidTokCodec

# of memory in GiB: None is no limit
WAYS = [(what, memory) for what in ("encode", "decode") for memory in (None, 2.0)]
# glibc gives back what is freed, see docs/tokenizer.md
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}


def measure(what: str, memory: float | None, size: int) -> str:
    torch.manual_seed(0)
    codec, latents = VidTokCodec(), (1, 5, size // 8, size // 8)
    given = 2 * torch.rand(1, 3, 17, size, size) - 1 if what == "encode" else torch.randn(1, 16, *latents[1:])
    # a limit that nothing reaches: the plan counts the clip at once
    codec.memory = int(memory * 2**30) if memory else 1 << 50
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    (codec.encode if what == "encode" else codec.decode)(given)
    seconds = time.perf_counter() - start
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    plan = (codec.plan_encode if what == "encode" else codec.plan_decode)(*latents)
    limit = f"{memory:g} GiB" if memory else "no limit"
    how = f"{plan.latent_frames or 'all'} latent frames at a time, tile {plan.tile or 'whole'}"
    return f"{what}, {limit} ({how}): counted {plan.bytes / 2**20:.0f} MiB, taken {taken:.0f} MiB, {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="side of the frames")
    parser.add_argument("--way", type=int, help="one of the ways, in this process")
    options = parser.parse_args()
    if options.way is not None:
        print(measure(*WAYS[options.way], options.size), flush=True)
        return
    for way in range(len(WAYS)):
        command = [sys.executable, __file__, "--size", str(options.size), "--way", str(way)]
        subprocess.run(command, env=os.environ | RETURNED, check=True)


if __name__ == "__main__":
    main()

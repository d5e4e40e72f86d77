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

from vft.convolution import convolutions
from vft.vidtok import VidTokCodec

# the share of a clip's activations that there is memory for
WAYS = [(what, share) for what in ("encode", "decode") for share in (1.0, 0.75)]
# glibc gives back what is freed, see docs/tokenizer.md
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}


def measure(what: str, share: float, size: int) -> str:
    torch.manual_seed(0)
    codec, latents = VidTokCodec(), (1, 5, size // 8, size // 8)
    given = 2 * torch.rand(1, 3, 17, size, size) - 1 if what == "encode" else torch.randn(1, 16, *latents[1:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan_of = codec.plan_encode if what == "encode" else codec.plan_decode
    # a limit that nothing reaches: the plan counts the clip at once
    codec.memory = 1 << 50
    whole = plan_of(*latents).bytes
    prepared = sum(conv.prepared_bytes() for conv in convolutions(codec))
    codec.memory = prepared + int(share * (whole - prepared))
    start = time.perf_counter()
    (codec.encode if what == "encode" else codec.decode)(given)
    seconds = time.perf_counter() - start
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    plan, limit = plan_of(*latents), f"--memory {codec.memory >> 20}M"
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

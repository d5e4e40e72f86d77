"""Published tokenizers before and after flexkernels.accelerate, in one process, alternating.

    FLEXKERNELS_VIDEOFLEXTOK=CHECKOUT[:REQUIREMENTS] python bench/integrations.py [--seconds 30] [--json FILE]

A VideoFlexTok of random weights, width 384, depth 6, 64 registers a latent frame, 5 x 16 x 16 latents (17 frames of
128 x 128). A linear codec stands in for the VAE, whose time would be the same. CHECKOUT is the published code, and
REQUIREMENTS a folder that holds what it imports; see tests/support/published.py.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
from report import machine, write

import flexkernels
from vft.measure import alternate

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
import published

VARIABLE = "FLEXKERNELS_VIDEOFLEXTOK"
WIDTH, DEPTH, REGISTERS, GRID = 384, 6, 64, (5, 16, 16)
STEPS, KEEP = 4, 8
OPTIONS = dict(timesteps=STEPS, guidance_scale=25.0, perform_norm_guidance=True, verbose=False)
LARGEST_ERROR = 1e-5


class Side:
    """One of two equal models, and its two calls."""

    def __init__(self, accelerated: bool):
        self.model = published.build(published.video_config(width=WIDTH, depth=DEPTH, registers=REGISTERS))
        self.video = torch.rand(1, 3, 17, 128, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
        self.ids = self.tokenize()
        if accelerated:
            flexkernels.accelerate(self.model)

    def tokenize(self) -> list[torch.Tensor]:
        return self.model.tokenize({"rgb": [self.video]})

    def detokenize(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        options = dict(vae_video_sizes=[GRID], num_keep_tokens_list=[KEEP], generator=generator)
        return self.model.detokenize(self.ids, **options, **OPTIONS)[0]


def check(before: Side, after: Side) -> float:
    """The relative error of the accelerated video; raises where tokens differ or it is too large."""
    if not torch.equal(before.tokenize()[0], after.tokenize()[0]):
        raise SystemExit("tokens differ")
    want, got = before.detokenize().double(), after.detokenize().double()
    error = float((got - want).norm() / want.norm())
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"the accelerated video is off by {error:.1e}, at most {LARGEST_ERROR:.0e} is right")
    return error


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="for each comparison")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reason = published.use_checkout(VARIABLE)
    if reason:
        raise SystemExit(reason)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before, after = Side(False), Side(True)
    report = {"machine": machine("cpu"), "error": check(before, after), "ms": {}}
    for call in ("tokenize", "detokenize"):
        contenders = {"published": getattr(before, call), "accelerated": getattr(after, call)}
        times = alternate(contenders, "cpu", arguments.seconds)
        report["ms"][call] = times
        ratio = times["published"] / times["accelerated"]
        print(f"{call}: published {times['published']:.0f} ms, accelerated {times['accelerated']:.0f} ms, {ratio:.1f}x")
    print(f"relative error of the video {report['error']:.1e}, tokens equal")
    if arguments.json:
        write(arguments.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

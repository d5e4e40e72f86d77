"""What the sampler's options save and cost on the embedded model, each by itself and together.

    python bench/options.py [--clips 4] [--json FILE]

A row is one way to decode: sequences that the transformer computes a sample (conditional and unconditional ones), the
time a call takes as a share of the first row's (medians of calls in turn), the relative L2 distance of the latents from
those of 1000 Euler steps in float32 with the same guidance from the same noise, and the PSNR to the source of the video
that they decode to; means over procedural clips that the model was not trained on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from report import machine, write
from solvers import REFERENCE_STEPS, SEED, distance

import vft
from vft.measure import alternate
from vft.metrics import psnr
from vft.solver import evaluations, interval, resolve, schedule
from vft.train.procedural import batch

KEEP = 16
GUIDANCE = vft.CFG(3.0)
INTERVAL = replace(GUIDANCE, scale=interval(GUIDANCE.scale, 0.2, 0.8))
ROWS = {
    "Euler, 40 steps": {"steps": 40},
    "Euler, 20 steps": {"steps": 20},
    "ab2, 20 steps": {"steps": 20, "solver": "ab2"},
    "guidance for t in 0.2 to 0.8": {"steps": 40, "guidance": INTERVAL},
    "null_every=2": {"steps": 40, "null_every": 2},
    "ab2, 20 steps, guidance for t in 0.2 to 0.8": {"steps": 20, "solver": "ab2", "guidance": INTERVAL},
    "ab2, 20 steps, null_every=2": {"steps": 20, "solver": "ab2", "null_every": 2},
    "fp8 weights": {"steps": 40, "weights": "fp8"},
    "fp8 weights, ab2, 20 steps, `null_every=2`": {"steps": 20, "solver": "ab2", "null_every": 2, "weights": "fp8"},
    "no guidance, Euler, 40 steps": {"steps": 40, "guidance": None},
    "no guidance, fp8 weights": {"steps": 40, "guidance": None, "weights": "fp8"},
}


def sequences(steps: int, solver: str = "euler", guidance=GUIDANCE, null_every: int = 1, weights=None) -> int:
    """Sequences that the transformer computes for a sample, with whatever weights."""
    plan = evaluations(solver, schedule(steps))
    guided = sum(resolve(guidance, evaluation.t) is not None for evaluation in plan)
    return len(plan) + -(-guided // null_every)


def rows(clips: int, reference_steps: int, seconds: float) -> list[dict]:
    models = {weights: vft.Tokenizer.from_pretrained("tiny", weights=weights) for weights in (None, "fp8")}
    model = models[None]
    source = batch(SEED, range(clips))
    latents = list(model.codec.encode(source))
    ids = model.encode_latents(latents)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for x in latents]

    def run(weights: str | None = None, **options) -> list[torch.Tensor]:
        return models[weights].decode_latents(ids, KEEP, noise=noise, **{"guidance": GUIDANCE} | options)

    exact = {}
    for guidance in (GUIDANCE, None):
        exact[guidance] = run(steps=reference_steps, guidance=guidance)
    times = alternate({name: lambda o=options: run(**o) for name, options in ROWS.items()}, "cpu", seconds)
    first, found = next(iter(times.values())).ms, []
    for name, options in ROWS.items():
        decoded = run(**options)
        # what leaves guidance out at some times is another approximation of guidance at all times
        want = exact[None if options.get("guidance", GUIDANCE) is None else GUIDANCE]
        video = model.codec.decode(torch.stack(decoded))
        found.append(
            {
                "name": name, "sequences": sequences(**options), "time": times[name].ms / first,
                "error": distance(decoded, want), "psnr": float(psnr(video, source).mean()),
            }
        )  # fmt: skip
    return found


def markdown(found: list[dict]) -> str:
    lines = ["| | sequences | time | error | PSNR |", "|---|---:|---:|---:|---:|"]
    for row in found:
        error = f"{row['error']:.2g}"
        lines.append(f"| {row['name']} | {row['sequences']} | {row['time']:.2f} | {error} | {row['psnr']:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, all rows together")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    found = rows(options.clips, options.reference_steps, options.seconds)
    print(markdown(found))
    if options.json:
        report = {"machine": machine("cpu"), "keep": KEEP, "clips": options.clips, "rows": found}
        write(options.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main()

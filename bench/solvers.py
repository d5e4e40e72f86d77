"""Error of each ODE solver over the number of velocity evaluations, on the embedded model.

    python bench/solvers.py [--clips 4] [--json FILE] [--plot FILE]

The error is the relative L2 distance of the decoded latents from those of 1000 Euler steps from the same noise, the
mean over procedural clips that the model was not trained on; without guidance, with CFG 3 and the published APG 25.
"""

import argparse
import json
from pathlib import Path

import torch
from report import machine, write

import vft
from vft.solver import SOLVERS
from vft.train.procedural import batch

KEEP, REFERENCE_STEPS = 16, 1000
EVALUATIONS = (4, 8, 12, 20, 32, 48, 80)
GUIDANCES = {"none": None, "CFG 3": vft.CFG(3.0), "APG 25": vft.APG(25.0, 0.6)}
# training has seed 0
SEED = 1


def distance(got, want) -> float:
    return sum(float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)) / len(want)


def curves(model, ids, noise, guidance, shift: float) -> dict[str, list[tuple[int, float]]]:
    """{solver: [(evaluations, error)]}; a solver of several evaluations a step takes fewer steps."""
    run = lambda **options: model.decode_latents(ids, KEEP, guidance=guidance, noise=noise, **options)  # noqa: E731
    exact = run(steps=REFERENCE_STEPS)
    found = {}
    for solver, cost in SOLVERS.items():
        budgets = [n for n in EVALUATIONS if n % cost == 0]
        found[solver] = [(n, distance(run(steps=n // cost, solver=solver, shift=shift), exact)) for n in budgets]
    return found


def markdown(report: dict) -> str:
    lines = []
    for name, solvers in report["errors"].items():
        lines += [f"guidance {name}", "", "| evaluations | " + " | ".join(map(str, EVALUATIONS)) + " |"]
        lines.append("| --- |" + " ---: |" * len(EVALUATIONS))
        for solver, points in solvers.items():
            known = dict(points)
            cells = (f"{known[n]:.2g}" if n in known else "" for n in EVALUATIONS)
            lines.append(f"| {solver} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(report: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(report["errors"]), figsize=(13, 4), sharey=True, layout="constrained")
    for axis, (name, solvers) in zip(axes, report["errors"].items(), strict=True):
        for solver, points in solvers.items():
            axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=solver)
        axis.set(title=f"guidance: {name}", xlabel="velocity evaluations")
        # a logarithmic axis would label minor ticks over one another
        ticks = [n for n in (4, 8, 16, 32, 64) if axis.get_xlim()[0] <= n <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"relative error to {REFERENCE_STEPS} Euler steps")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--shift", type=float, default=1.0, help="of the schedule; the reference is not shifted")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--load", type=Path, help="the JSON of an earlier run: nothing is measured")
    options = parser.parse_args()
    if options.load:
        report = json.loads(options.load.read_text())
        print(markdown(report))
        if options.plot:
            plot(report, options.plot)
        return
    model = vft.Tokenizer.from_pretrained("tiny")
    latents = list(model.codec.encode(batch(SEED, range(options.clips))))
    ids = model.encode_latents(latents)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for x in latents]
    errors = {name: curves(model, ids, noise, g, options.shift) for name, g in GUIDANCES.items()}
    report = {"machine": machine("cpu"), "keep": KEEP, "clips": options.clips, "shift": options.shift, "errors": errors}
    print(markdown(report))
    if options.json:
        write(options.json, json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()

"""What each part of the tokenizer's engine contributes to a guided sampler step, one added after the other.

    python bench/contributions.py [--seconds 4] [--json FILE]

The middling decoder of cases/tokenizer.py: width 384, depth 6, keep 8 of 64 registers, conditional and unconditional.
"""

import argparse
import json
from pathlib import Path

import torch
from cases.tokenizer import Middling, close
from report import machine, write

from vft.measure import alternate
from vft.modulation import ModulationTable
from vft.packing import Member

STEPS = 3


class Sampler:
    """The velocities of all steps; nothing but what `tables` and the packing decide is shared between steps."""

    def __init__(self, it: Middling, collapse: bool, packed: bool, tables: bool):
        self.it, self.tables = it, tables
        self.x = [it.noise.to(it.dtype)]
        members = (Member(0, it.keep), Member(0, it.keep, null=True))
        decoder = it.model.decoder
        calls = [members] if packed else [members[:1], members[1:]]
        self.packings = [decoder.packing(self.x, call, collapse) for call in calls]

    def __call__(self) -> list[torch.Tensor]:
        decoder, times = self.it.model.decoder, [1 - i / STEPS for i in range(STEPS)]
        table = ModulationTable(decoder, times) if self.tables else None
        registers = [decoder.embed_registers(self.it.codes, made) for made in self.packings]
        for i, t in enumerate(times):
            out = []
            for made, rows in zip(self.packings, registers, strict=True):
                modulation = table[i] if self.tables else decoder.modulation(torch.tensor([t]))
                out += decoder.velocity(self.x, rows, modulation, made)
        return out


def published(it: Middling) -> list[torch.Tensor]:
    for i in range(STEPS):
        t = torch.tensor([1 - i / STEPS])
        out = [it.plain(it.noise, t, it.codes, it.keep, null) for null in (False, True)]
    return out


def contenders(it: Middling) -> dict:
    return {
        "plain PyTorch, dense mask": lambda: published(it),
        "fused kernels, joined weights": Sampler(it, collapse=False, packed=False, tables=False),
        "+ schedule tables": Sampler(it, collapse=False, packed=False, tables=True),
        "+ packed guidance": Sampler(it, collapse=False, packed=True, tables=True),
        "+ collapse": Sampler(it, collapse=True, packed=True, tables=True),
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"machine": machine("cpu"), "steps": STEPS, "ms_per_step": {}}
    for dtype in (torch.float32, torch.bfloat16):
        it = Middling("cpu", dtype)
        runs = contenders(it)
        want = published(it)
        for name, run in runs.items():
            wrong = close(run(), want, dtype, 1e-5)
            if wrong:
                raise SystemExit(f"{name}: {wrong}")
        times = alternate(runs, "cpu", options.seconds)
        report["ms_per_step"][str(dtype).removeprefix("torch.")] = {
            name: timing.ms / STEPS for name, timing in times.items()
        }
    columns = report["ms_per_step"]
    print("| | " + " | ".join(f"{name}, ms a step" for name in columns) + " |\n|---|" + "---:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns.values()) + " |")
    if options.json:
        write(options.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

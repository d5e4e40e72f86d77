"""Sweeps the tables of tiles in flexkernels/tuning on this GPU and writes one for it.

    python bench/tune.py --folder FOLDER [--only KERNEL ...] [--processes N] [--budget SECONDS]
    cp FOLDER/sm_90.json flexkernels/tuning/

A case of bench/cases that launches a kernel of the table says which of its entries it takes; candidates replace that
entry one by one. They are compiled by N processes, then each is checked, then all are timed in turns inside CUDA
graphs. An entry gets the candidate with the least geometric mean of times over its cases, each relative to the best of
the case, where that beats the entry of today by more than MARGIN. FOLDER gets the table after every kernel and
tiles.json with all times, as a report has them under "tiles". Cases that nothing in the table concerns are skipped.
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import math
import multiprocessing
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from cases import CASES, Case
from graphs import STANDIN, captured
from report import own_stream, write

import flexkernels
from flexkernels import tuning
from vft.measure import alternate, turn

DEVICE = "cpu" if STANDIN else "cuda"
# the tables are those of the Triton kernels
BACKEND = "auto" if STANDIN else "triton"
MARGIN = 1.02
SECONDS_A_CANDIDATE = 0.03
SWEPT = (
    "attention_full16k_d64_bf16", "attention_causal16k_d64_bf16", "attention_full16k_d128_bf16",
    "attention_encoder_bf16", "attention_decoder_bf16", "attention_collapsed_bf16", "attention_ragged_bf16",
    "attention_encoder_backward_bf16", "skinny_linear_head_bf16", "skinny_linear_small_bf16",
    "skinny_linear_swiglu_bf16", "skinny_linear_head_int8", "decode_attention_g256_bf16",
    "decode_attention_g1280_bf16", "decode_attention_gqa_bf16", "decode_attention_large_bf16", "adaln_norm_bf16",
    "gated_residual_adaln_norm_bf16", "rms_norm_bf16", "gated_residual_adaln_norm_backward_bf16",
)  # fmt: skip
# by kernel, the values of each field; a field or kernel that is not here is tried at half and at twice its value
GRIDS = {
    "attention_layout": {"rows": (64, 128), "step": (64,)},
    "attention_forward": {
        "block": (64, 128),
        "step": (32, 64, 128),
        "warps": (4, 8),
        "stages": (2, 3),
        "tma": (True, False),
    },
    "attention_dq": {"block": (64, 128), "step": (32, 64), "warps": (4, 8), "stages": (2, 3)},
    "attention_dkdv": {"block": (64, 128), "step": (32, 64), "warps": (4, 8), "stages": (2, 3)},
}
LIMITS = {"warps": (1, 16), "stages": (1, 5), "maxnreg": (64, 255)}


@dataclass
class Sweep:
    """An entry of a kernel's list, what takes it, and the milliseconds of each candidate by case."""

    kernel: str
    index: int
    cases: list[str]
    candidates: list[dict]
    times: dict[str, dict[int, float]] = field(default_factory=dict)

    def best(self) -> int:
        """The candidate to use; 0, that of today, unless another is clearly faster. Only those that all cases ran."""
        common = set.intersection(*(set(times) for times in self.times.values())) if self.times else set()
        if 0 not in common:
            return 0
        mean = {i: math.fsum(math.log(times[i] / times[0]) for times in self.times.values()) for i in common}
        first = min(mean, key=mean.get)
        return first if mean[first] < -math.log(MARGIN) * len(self.times) else 0


def table_of_today() -> dict:
    """That of this architecture, or the default one's entries to begin with."""
    arch = tuning._arch()
    table = copy.deepcopy(tuning.TABLES.get(arch, tuning.TABLES[tuning.DEFAULT]))
    count = len(SWEPT)
    source = (
        f"bench/tune.py: {count} cases of bench/cases inside CUDA graphs, every candidate checked before it was timed"
    )
    device = "stand-in" if STANDIN else torch.cuda.get_device_name()
    return table | {"arch": arch, "device": device, "date": datetime.date.today().isoformat(), "source": source}


def use(table: dict) -> None:
    """Kernels launched from now on take their tiles from `table`."""
    tuning.TABLES[table["arch"]] = table
    tuning._choose.cache_clear()


@contextlib.contextmanager
def replaced(table: dict, kernel: str, index: int, values: dict):
    """The table with one entry replaced, inside the block."""
    entry = table["entries"][kernel][index]
    before, entry["use"] = entry["use"], values
    use(table)
    try:
        yield
    finally:
        entry["use"] = before
        use(table)


@contextlib.contextmanager
def noticed(table: dict):
    """The set of (kernel, index) of the entries that are looked up inside the block."""
    found, choose = set(), tuning.choose

    def noticing(kernel: str, **facts) -> dict:
        chosen = choose(kernel, **facts)
        entries = table["entries"][kernel]
        found.add((kernel, next(i for i, entry in enumerate(entries) if entry["use"] is chosen)))
        return chosen

    tuning.choose = noticing
    try:
        yield found
    finally:
        tuning.choose = choose


def candidates(kernel: str, values: dict) -> list[dict]:
    """Those to try, that of today first."""
    grid = GRIDS.get(kernel, {})
    names = list(values)
    if grid:
        options = [grid.get(name, (values[name],)) for name in names]
        found = [dict(zip(names, each, strict=True)) for each in itertools.product(*options)]
        # a cap on registers is tried with and without
        found += [{k: v for k, v in each.items() if k != "maxnreg"} for each in found if "maxnreg" in each]
    else:
        found = [values | {name: n} for name in names for n in neighbours(name, values[name])]
    return [values, *(each for each in found if each != values)]


def neighbours(name: str, value) -> list[int]:
    if not isinstance(value, int) or isinstance(value, bool):
        return []
    low, high = LIMITS.get(name, (1, 2**20))
    steps = (value - 1, value + 1) if name == "stages" else (value // 2, 2 * value)
    return [n for n in steps if low <= n <= high]


def run_case(name: str) -> Case:
    made = CASES[name](DEVICE)
    made.ours()
    return made


def found_sweeps(table: dict, names: list[str]) -> list[Sweep]:
    """A sweep for every entry that one of the cases takes."""
    taken = {}
    for name in names:
        with noticed(table) as found, contextlib.suppress(Exception):
            run_case(name)
        for key in found:
            taken.setdefault(key, []).append(name)
    order = list(table["entries"])
    return [
        Sweep(kernel, index, cases, candidates(kernel, table["entries"][kernel][index]["use"]))
        for (kernel, index), cases in sorted(taken.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]


def compile_some(table: dict, sweep: Sweep, case: str, indices: list[int], end: float) -> list[str]:
    """In a process of its own: one run of each candidate fills the caches on disk. What raised, for the log."""
    torch.set_num_threads(1)
    failed = []
    with torch.no_grad(), flexkernels.backend(BACKEND):
        for index in indices:
            if time.monotonic() > end:
                break
            try:
                with replaced(table, sweep.kernel, sweep.index, sweep.candidates[index]):
                    run_case(case)
            except Exception as error:
                failed.append(f"{case}, {sweep.candidates[index]}: {type(error).__name__}: {str(error)[:100]}")
    return failed


def measure(table: dict, sweep: Sweep, case: str) -> None:
    """Milliseconds of each candidate that is right, in turns inside graphs, into sweep.times."""
    calls = {}
    for index, values in enumerate(sweep.candidates):
        with contextlib.suppress(Exception), replaced(table, sweep.kernel, sweep.index, values):
            made = run_case(case)
            if made.check() is None:
                # a graph keeps what was launched; the stand-in for one has to launch it again
                plain = partial(launched, table, sweep, values, made.ours) if STANDIN else made.ours
                calls[index] = captured(plain, DEVICE, lambda call: turn(call, 1, DEVICE))
    if calls:
        timings = alternate(calls, DEVICE, SECONDS_A_CANDIDATE * len(calls))
        sweep.times[case] = {index: timing.ms / calls[index].count for index, timing in timings.items()}


def launched(table: dict, sweep: Sweep, values: dict, ours):
    with replaced(table, sweep.kernel, sweep.index, values):
        return ours()


def rows_of(sweep: Sweep, flops: dict[str, int]) -> list[dict]:
    return [
        {
            "kernel": sweep.kernel,
            "class": case,
            "tiles": sweep.candidates[index],
            "ms": ms,
            "tflop_s": flops.get(case, 0) / ms / 1e9 or None,
        }
        for case, times in sweep.times.items()
        for index, ms in times.items()
    ]


def sweep_all(options: argparse.Namespace, names: list[str]) -> dict:
    """The tuned table; the folder gets it, and all times, after each kernel."""
    end, table, rows = time.monotonic() + options.budget, table_of_today(), []
    use(table)
    with torch.no_grad(), flexkernels.backend(BACKEND), own_stream(DEVICE):
        sweeps = [s for s in found_sweeps(table, names) if not options.only or s.kernel in options.only]
        flops = {name: CASES[name](DEVICE).flops for name in {case for sweep in sweeps for case in sweep.cases}}
        for sweep in sweeps:
            if time.monotonic() > end:
                print(f"out of time before {sweep.kernel}", flush=True)
                break
            for line in compiled_beforehand(table, sweep, options.processes, end):
                print(line, flush=True)
            for case in sweep.cases:
                if time.monotonic() < end:
                    measure(table, sweep, case)
            best = sweep.candidates[sweep.best()]
            print(f"{sweep.kernel}, entry {sweep.index} ({', '.join(sweep.cases)}): {best}", flush=True)
            table["entries"][sweep.kernel][sweep.index]["use"] = best
            use(table)
            rows += rows_of(sweep, flops)
            write(options.folder / f"{table['arch']}.json", text_of(table))
            write(options.folder / "tiles.json", json.dumps(rows, indent=1) + "\n")
    return table


def compiled_beforehand(table: dict, sweep: Sweep, processes: int, end: float) -> list[str]:
    if processes < 2 and not STANDIN:
        return []
    indices = range(len(sweep.candidates))
    tasks = [
        (table, sweep, case, list(indices[first::processes]), end) for case in sweep.cases for first in range(processes)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [line for lines in pool.starmap(compile_some, tasks) for line in lines]


def text_of(table: dict) -> str:
    """The table with an entry a line, as it is committed."""
    plain = {name: value for name, value in table.items() if name != "entries"}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in plain.items()]
    kernels = [
        f"    {json.dumps(kernel)}: [\n" + ",\n".join(f"      {json.dumps(entry)}" for entry in entries) + "\n    ]"
        for kernel, entries in table["entries"].items()
    ]
    return "{\n" + "\n".join(lines) + '\n  "entries": {\n' + ",\n".join(kernels) + "\n  }\n}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="KERNEL")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing after this"
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    table = sweep_all(options, [standin.CASE] if STANDIN else list(SWEPT))
    tuning.read(options.folder / f"{table['arch']}.json")
    return 0


if STANDIN:
    import standin

if __name__ == "__main__":
    sys.exit(main())

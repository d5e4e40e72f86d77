"""Measures our ops against their peers on this machine.

    python bench/report.py [--only NAME ...] [--json FILE] [--markdown] [--plot FILE.png] [--compare OLD.json]
    python bench/report.py --load FILE [--only NAME ...] [--plot FILE.png] [--compare OLD.json]

A case whose result is wrong, or that raises, gets no times and no ratio, and the exit code is 1; so it is where
--compare finds a case that has become slower beyond noise (bench/compare.py). --load prints the table of an earlier
run, nothing is measured.

On a GPU each case is timed as called from Python, and under "graph" inside a CUDA graph: the kernels alone. --json FILE
is written after every case; with --resume the cases that it holds are not measured again. --budget ends the run in
time: the cases left over are named. Exit code 3: the device was lost to a fault of the last case; --resume goes on.
--warm N lets N processes compile beforehand what the chosen cases compile, into the caches on disk.
"""

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import torch
from cases import CASES, names_for
from compare import compare
from graphs import STANDIN
from measuring import device_lost, record_of
from render import line, markdown, plot
from warm import warm

import flexkernels
from flexkernels import library
from vft.measure import ceilings

DEVICE_LOST = 3


def machine(device: str) -> dict:
    """Where and with what the numbers were taken."""
    return {
        "device": device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "flexkernels": flexkernels.__version__,
        "backend": library.current_backend(),
        "backends": flexkernels.available_backends(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def write(path: Path, text: str):
    """The whole file or none of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def chosen(patterns: list[str] | None, names: Collection[str]) -> list[str]:
    """The names that match one of the patterns, all without patterns. Exits where a pattern names none."""
    if not patterns:
        return list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"--only must name a case or a pattern of {', '.join(names)}, got {pattern}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def measured(options: argparse.Namespace) -> dict:
    """The report of a run over the chosen cases; a line of JSON a case on the way, unless a table is to come."""
    names = chosen(options.only, names_for(options.device))
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    with own_stream(options.device):
        report = begun(options)
        done = {record["name"] for record in report["records"]}
        for name in (name for name in names if name not in done):
            if options.budget and time.monotonic() - began > options.budget:
                report.setdefault("left_out", []).append(name)
                continue
            make = lambda name=name: CASES[name](options.device)  # noqa: E731
            record = record_of(name, make, options.device, report["ceilings"], options.seconds)
            report["records"].append(record)
            # compiled graphs of one case must not count towards another's limit of recompilations
            torch._dynamo.reset()
            if options.json:
                # after every case, so that a run that is cut off leaves what it has
                write(options.json, json.dumps(report, indent=1) + "\n")
            if not options.markdown:
                print(line(record) if options.device == "cuda" or STANDIN else json.dumps(record), flush=True)
            if record["error"] and device_lost(options.device):
                raise SystemExit(DEVICE_LOST)
    if report.get("left_out"):
        print(f"out of time, not measured: {', '.join(report['left_out'])}", file=sys.stderr)
    return report


def begun(options: argparse.Namespace) -> dict:
    """The report that --resume goes on with, or a new one."""
    if options.resume and options.json and options.json.exists():
        report = json.loads(options.json.read_text())
        report.pop("left_out", None)
        return report
    most = ceilings(options.device, 0.05 if STANDIN else 1.0)
    return {"machine": machine(options.device), "ceilings": most, "records": []}


def own_stream(device: str):
    """A graph is not captured on the default stream, and autograd's backward runs on the stream of its forward."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def loaded(options: argparse.Namespace) -> dict:
    """An earlier report, cut to the chosen cases."""
    report = json.loads(options.load.read_text())
    names = chosen(options.only, [record["name"] for record in report["records"]])
    return report | {"records": [record for record in report["records"] if record["name"] in names]}


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run; patterns such as 'fsq_*' are allowed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--markdown", action="store_true", help="print a table rather than a line a case")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw fraction of bound and speed-up there (PNG)")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="flag what is slower than in this earlier report")
    parser.add_argument("--load", type=Path, metavar="FILE", help="take the records from there, measure nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --json FILE holds")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after this long")
    parser.add_argument("--warm", type=int, metavar="N", help="only compile, in N processes, and measure nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long the contenders of a case take turns")
    parser.add_argument("--threads", type=int, help="CPU threads (default: those of torch)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    # read first: a wrong path must not cost a run
    old = json.loads(options.compare.read_text()) if options.compare else None
    if options.warm:
        failed = warm(chosen(options.only, names_for(options.device)), options.device, options.warm, options.budget)
        print("\n".join(failed) or "all cases ran once")
        return 0
    report = loaded(options) if options.load else measured(options)
    if options.markdown or (options.load and not (options.plot or options.compare)):
        print(markdown(report))
    if options.plot:
        plot(report, options.plot)
    regressions = 0
    if old is not None:
        try:
            lines, regressions = compare(old, report)
        except ValueError as error:
            raise SystemExit(f"--compare {options.compare}: {error}") from error
        print("\n".join(lines))
    return 0 if all(record["correct"] for record in report["records"]) and not regressions else 1


if __name__ == "__main__":
    sys.exit(main())

"""Measures our ops against their peers on this machine.

    python bench/report.py [--only NAME ...] [--json FILE] [--markdown]

A case whose result is wrong gets no times and no ratio, and the exit code is 1.
"""

import argparse
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cases import CASES, Case
from measure import alternate, bound_ms, ceilings

import flexkernels
from flexkernels import library


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


def measure(case: Case, device: str, ceiling: dict, seconds: float) -> dict:
    """One record. Correctness comes first: without it nothing is timed."""
    record = {
        "name": case.name,
        "device": device,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "ours_ms": None,
        "peers": {},
        "ratio": None,
        "bound_ms": bound_ms(case.bytes, case.flops, case.dtype, ceiling),
        "fraction_of_bound": None,
        "correct": True,
        "note": case.note,
    }
    wrong = case.check()
    if wrong is not None:
        return record | {"correct": False, "note": f"WRONG: {wrong}"}
    times = alternate({"ours": case.ours, **case.peers}, device, seconds)
    ours = times.pop("ours")
    return record | {
        "ours_ms": ours,
        "peers": times,
        "ratio": min(times.values()) / ours if times else None,
        "fraction_of_bound": record["bound_ms"] / ours,
    }


def markdown(report: dict) -> str:
    """The records as a table, under a line on the machine."""
    where, ceiling = report["machine"], report["ceilings"]
    lines = [
        f"{where['gpu'] or where['processor']}, {where['threads']} CPU threads, torch {where['torch']}, "
        f"commit {where['commit']}; copy {ceiling['copy_gb_s']:.0f} GB/s, read {ceiling['read_gb_s']:.0f} GB/s, "
        f"GEMM {ceiling['gemm_fp32_gflop_s']:.0f} (fp32) and {ceiling['gemm_bf16_gflop_s']:.0f} (bf16) GFLOP/s",
        "",
        "| case | shape | ours ms | peers ms | best peer / ours | of bound | correct |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for record in report["records"]:
        peers = ", ".join(f"{name} {ms:.3g}" for name, ms in record["peers"].items())
        shape = " x ".join(map(str, record["shape"]))
        numbers = [record["ours_ms"], record["ratio"], record["fraction_of_bound"]]
        ours, ratio, fraction = ("-" if value is None else f"{value:.3g}" for value in numbers)
        verdict = "yes" if record["correct"] else record["note"]
        lines.append(f"| {record['name']} | {shape} | {ours} | {peers} | {ratio} | {fraction} | {verdict} |")
    return "\n".join(lines)


def write(path: Path, text: str):
    """The whole file or none of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def chosen(patterns: list[str] | None) -> list[str]:
    if not patterns:
        return list(CASES)
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise SystemExit(f"--only must name a case or a pattern of {', '.join(CASES)}, got {pattern}")
    return [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run; patterns such as 'fsq_*' are allowed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--markdown", action="store_true", help="print a table rather than a line a case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long the contenders of a case take turns")
    parser.add_argument("--threads", type=int, help="CPU threads (default: those of torch)")
    options = parser.parse_args()
    names = chosen(options.only)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = {"machine": machine(options.device), "ceilings": ceilings(options.device), "records": []}
    for name in names:
        record = measure(CASES[name](options.device), options.device, report["ceilings"], options.seconds)
        report["records"].append(record)
        if not options.markdown:
            print(json.dumps(record), flush=True)
    if options.markdown:
        print(markdown(report))
    if options.json:
        write(options.json, json.dumps(report, indent=1) + "\n")
    return 0 if all(record["correct"] for record in report["records"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every .cu file for GPUs that need not be present and reads what the assembler says of each kernel.

    python tests/support/cuda_gate.py [FILE.cu ...] [--write]

prints JSON: by file, architecture and kernel, the most registers and static shared memory (bytes) of its
instantiations, and what lies in local memory or is spilled. --write puts those of each file, as soon as it is compiled,
into tests/data/cuda_registers.json, which test_cuda_compile.py compares with; other files' rows stay.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from paths import CUDA_REGISTERS, ROOT

CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a", "100")
KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_\w+'")
NAME = re.compile(r"\d([a-z_]+_kernel)")


def nvcc() -> str | None:
    """As the build finds it."""
    spec = importlib.util.spec_from_file_location("flexkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


def sources() -> list[pathlib.Path]:
    """All .cu files, those that take longest first."""
    return sorted(CUDA.glob("*.cu"), key=lambda file: -file.stat().st_size)


def compiled(file, architecture: str) -> str:
    """The assembler's report on the device code of one file; raises RuntimeError with the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        target = ["-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-o", os.path.join(folder, "kernels.cubin")]
        result = subprocess.run([nvcc(), "-std=c++17", "-O3", *target, str(file)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{file}: {result.stderr[-3000:]}")
    return result.stderr


def kernels(report: str) -> dict[str, dict]:
    """{kernel: {registers, shared, local}} of a report of ptxas -v; the most of all instantiations."""
    found = {}
    # text before the first kernel, then (mangled name, what is said of it)
    parts = KERNEL.split(report)[1:]
    for mangled, text in zip(parts[::2], parts[1::2], strict=True):
        name = NAME.search(mangled)
        numbers = {
            "registers": re.findall(r"Used (\d+) registers", text),
            "shared": re.findall(r"(\d+) bytes smem", text) or ["0"],
            "local": [str(sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill \w+|lmem)", text))))],
        }
        row = found.setdefault(name[1] if name else mangled, dict.fromkeys(numbers, 0))
        for key, values in numbers.items():
            row[key] = max(row[key], *map(int, values))
    return found


def report_of(file) -> dict:
    """{architecture: {kernel: numbers}} of one file, and under "warnings" the lines that tell of lost speed."""
    report = {"warnings": []}
    for architecture in ARCHITECTURES:
        text = compiled(file, architecture)
        report[architecture] = dict(sorted(kernels(text).items()))
        report["warnings"] += [line for line in text.splitlines() if "serialized" in line or "Performance" in line]
    return report


def gate(files):
    """(file's name, its report) of each, in the order they end."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = {pool.submit(report_of, file): pathlib.Path(file).name for file in files}
        for task in concurrent.futures.as_completed(tasks):
            yield tasks[task], task.result()


def table() -> dict:
    return json.loads(CUDA_REGISTERS.read_text()) if CUDA_REGISTERS.exists() else {}


def rows_of(report: dict) -> dict:
    """{architecture: {kernel: [registers, shared]}} of one file's report: what the table keeps of it."""
    return {
        architecture: {name: [row["registers"], row["shared"]] for name, row in report[architecture].items()}
        for architecture in ARCHITECTURES
    }


def write(name: str, report: dict):
    merged = table() | {name: rows_of(report)}
    kept = {file: rows for file, rows in sorted(merged.items()) if (CUDA / file).exists()}
    CUDA_REGISTERS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", default=sources())
    parser.add_argument("--write", action="store_true", help=f"write {CUDA_REGISTERS.name}")
    options = parser.parse_args()
    start, reports = time.monotonic(), {}
    for name, report in gate(options.files):
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        reports[name] = report
        if options.write:
            write(name, report)
    print(json.dumps(reports))

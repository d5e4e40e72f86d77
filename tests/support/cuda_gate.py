"""Compiles every .cu file for GPUs that need not be present and reads what the assembler says of each kernel.

    python tests/support/cuda_gate.py [FILE.cu ...] [--write]

prints JSON: by architecture, then kernel, the most registers and static shared memory (bytes) of its instantiations,
and what lies in local memory or is spilled. --write puts them into tests/data/cuda_registers.json, which
test_cuda_compile.py compares with.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import subprocess

from paths import CUDA_REGISTERS, ROOT

ARCHITECTURES = ("80", "90a", "100")
KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
NAME = re.compile(r"\d([a-z_]+_kernel)")


def nvcc() -> str | None:
    """As the build finds it."""
    spec = importlib.util.spec_from_file_location("flexkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


def compiled(file) -> str:
    """The assembler's report on one file; raises RuntimeError with the compiler's message."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    command = [nvcc(), "-std=c++17", "-O3", "-c", "-Xptxas=-v", *targets, str(file), "-o", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{file}: {result.stderr[-3000:]}")
    return result.stderr


def kernels(report: str) -> dict[str, dict[str, dict]]:
    """{architecture: {kernel: {registers, shared, local}}} of a report of ptxas -v; the most of all instantiations."""
    found = {}
    # text before the first kernel, then (mangled name, architecture, what is said of it)
    parts = KERNEL.split(report)[1:]
    for mangled, architecture, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        name = NAME.search(mangled)
        numbers = {
            "registers": re.findall(r"Used (\d+) registers", text),
            "shared": re.findall(r"(\d+) bytes smem", text) or ["0"],
            "local": [str(sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill \w+|lmem)", text))))],
        }
        row = found.setdefault(architecture, {}).setdefault(name[1] if name else mangled, dict.fromkeys(numbers, 0))
        for key, values in numbers.items():
            row[key] = max(row[key], *map(int, values))
    return found


def gate(files) -> dict:
    """Those of all files, and under "warnings" the lines that tell of lost speed."""
    report = {name: {} for name in ARCHITECTURES} | {"warnings": []}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for text in pool.map(compiled, files):
            for architecture, rows in kernels(text).items():
                report[architecture] |= rows
            report["warnings"] += [line for line in text.splitlines() if "serialized" in line or "Performance" in line]
    return report


def table_of(report: dict) -> dict:
    return {
        architecture: {name: [row["registers"], row["shared"]] for name, row in sorted(report[architecture].items())}
        for architecture in ARCHITECTURES
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", default=sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    parser.add_argument("--write", action="store_true", help=f"write {CUDA_REGISTERS.name}")
    options = parser.parse_args()
    report = gate(options.files)
    if options.write:
        CUDA_REGISTERS.write_text(json.dumps(table_of(report), indent=1) + "\n")
    print(json.dumps(report))

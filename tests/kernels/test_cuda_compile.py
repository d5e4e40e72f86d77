"""Every CUDA kernel compiles for the GPUs we name, in registers, and takes no more of them than it did."""

import json

import cuda_gate
import pytest
from paths import CUDA_REGISTERS, ROOT

# what a kernel may take beyond the table: another nvcc allocates differently
MORE = 1.25

REPORT = """
ptxas info    : Compiling entry function '_ZN11flexkernels4cuda3_N_117norm_kernelILi8EEEvi' for 'sm_90a'
ptxas info    : Function properties for _ZN11flexkernels4cuda3_N_117norm_kernelILi8EEEvi
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_ZN11flexkernels4cuda3_N_117norm_kernelILi4EEEvi' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers
ptxas info    : Compiling entry function '_ZN11flexkernels4cuda3_N_117norm_kernelILi4EEEvi' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 512 bytes cmem[0]
"""


def test_a_report_is_read():
    assert cuda_gate.kernels(REPORT) == {
        "90a": {"norm_kernel": {"registers": 64, "shared": 1024, "local": 28}},
        "80": {"norm_kernel": {"registers": 32, "shared": 0, "local": 0}},
    }


@pytest.fixture(scope="module")
def report():
    if cuda_gate.nvcc() is None:
        pytest.skip("nvcc is not here")
    return cuda_gate.gate(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))


@pytest.mark.slow
def test_nothing_is_in_local_memory_or_serialized(report):
    assert report["warnings"] == []
    assert [(a, name) for a in cuda_gate.ARCHITECTURES for name, row in report[a].items() if row["local"]] == []


@pytest.mark.slow
def test_registers_and_shared_memory_are_those_of_the_table(report):
    table, found = json.loads(CUDA_REGISTERS.read_text()), cuda_gate.table_of(report)
    write = "run: python tests/support/cuda_gate.py --write"
    for architecture, rows in table.items():
        assert sorted(rows.keys() ^ found[architecture].keys()) == [], f"sm_{architecture}: {write}"
        now = found[architecture]
        more = [
            f"{name} on sm_{architecture}: {now[name]} where the table has {row}"
            for name, row in rows.items()
            if any(a > MORE * b for a, b in zip(now[name], row, strict=True))
        ]
        assert more == [], write

"""Every CUDA kernel compiles for the GPUs we name, in registers, and takes no more of them than it did."""

import cuda_gate
import pytest

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
ptxas info    : Compiling entry function '_ZN11flexkernels4cuda3_N_117sums_kernelILi4EEEvi' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 512 bytes cmem[0]
"""


def test_a_report_is_read():
    assert cuda_gate.kernels(REPORT) == {
        "norm_kernel": {"registers": 64, "shared": 1024, "local": 28},
        "sums_kernel": {"registers": 32, "shared": 0, "local": 0},
    }


def test_every_file_has_its_rows_and_others_keep_theirs(tmp_path, monkeypatch):
    """--write of one file, and of a table with a file that is gone."""
    monkeypatch.setattr(cuda_gate, "CUDA_REGISTERS", tmp_path / "table.json")
    report = {architecture: cuda_gate.kernels(REPORT) for architecture in cuda_gate.ARCHITECTURES}
    for name in ("linear.cu", "gone.cu", "flow.cu"):
        cuda_gate.write(name, report)
    rows = {"norm_kernel": [64, 1024], "sums_kernel": [32, 0]}
    assert cuda_gate.table() == dict.fromkeys(("flow.cu", "linear.cu"), dict.fromkeys(cuda_gate.ARCHITECTURES, rows))


def test_the_table_is_of_all_files():
    """A file without a kernel has no row in it."""
    assert sorted(cuda_gate.table()) == sorted(file.name for file in cuda_gate.sources())


@pytest.fixture(scope="module")
def reports():
    if cuda_gate.nvcc() is None:
        pytest.skip("nvcc is not here")
    return dict(cuda_gate.gate(cuda_gate.sources()))


@pytest.mark.slow
def test_nothing_is_in_local_memory_or_serialized(reports):
    assert [line for report in reports.values() for line in report["warnings"]] == []
    spilled = [
        (file, architecture, name)
        for file, report in reports.items()
        for architecture in cuda_gate.ARCHITECTURES
        for name, row in report[architecture].items()
        if row["local"]
    ]
    assert spilled == []


@pytest.mark.slow
def test_registers_and_shared_memory_are_those_of_the_table(reports):
    table, more = cuda_gate.table(), []
    for file, report in reports.items():
        for architecture, now in cuda_gate.rows_of(report).items():
            rows = table[file][architecture]
            assert rows.keys() == now.keys(), f"{file}: run python tests/support/cuda_gate.py {file} --write"
            more += [
                f"{name} of {file} on sm_{architecture}: {now[name]} where the table has {row}"
                for name, row in rows.items()
                if any(a > MORE * b for a, b in zip(now[name], row, strict=True))
            ]
    assert more == []

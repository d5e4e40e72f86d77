"""Every Triton kernel compiles for GPUs that are not here, without spilling registers and within shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# bytes of shared memory that one block may use
TARGETS = {"cuda-80": 163 * 1024, "cuda-90": 227 * 1024, "cuda-100": 227 * 1024, "hip-gfx942": 64 * 1024}
KERNELS = {"fsq_quantize_kernel", "fsq_dequantize_kernel", "flow_step_kernel"}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # a cache of its own, so that the kernels are really compiled
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("triton_gate.py")), *target.split("-")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert {kernel["name"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["shared"] <= TARGETS[target], kernel
    if any(kernel["spills"] is None for kernel in kernels):
        pytest.skip("compiled, but no ptxas was found to count spills")
    assert all(kernel["spills"] == 0 for kernel in kernels), kernels

"""Every Triton kernel compiles for GPUs that are not here: in registers, in shared memory, and for arguments of 1.

FLEXKERNELS_GATE_PYTHON names the Python of another environment, with another version of Triton, to compile there too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REGISTERS, ROOT

import flexkernels

pytest.importorskip("triton")

# bytes of shared memory that one block may use
TARGETS = {"cuda-80": 163 * 1024, "cuda-90": 227 * 1024, "cuda-100": 227 * 1024, "hip-gfx942": 64 * 1024}
PYTHONS = [sys.executable, *filter(None, [os.environ.get("FLEXKERNELS_GATE_PYTHON")])]
# bytes of local memory that attention may take where its tiles are those of another GPU
UNTUNED = 256
# what a launch may take beyond the table of its version of Triton
MORE = 1.1


@pytest.fixture(scope="module", params=[pytest.param(t, marks=[pytest.mark.slow] * (t != "cuda-90")) for t in TARGETS])
def target(request):
    return request.param


@pytest.fixture(scope="module", params=PYTHONS, ids=["here", "other"][: len(PYTHONS)])
def report(request, target, tmp_path_factory):
    """What triton_gate.py says of one target, in a process of its own: no interpreter, an empty cache."""
    report = printed(request.param, "triton_gate.py", target, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert {found["kernel"] for found in report[target]["compiled"]} == set(report["kernels"])
    return report


def printed(python, script, *arguments, **variables):
    """The JSON that a script prints in a process of its own, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(flexkernels.__file__).parents[1])} | variables
    command = [python, str(ROOT / "tests" / "support" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_no_length_compiles_attention_anew():
    """Batches of other lengths, forward and backward: a kernel has one key, the one that its first batch compiled."""
    keys = printed(sys.executable, "triton_keys.py")
    assert len(keys) == 6 and all(len(batches) == 1 for batches in keys.values()), keys


def test_kernels_compile(report, target):
    found = report[target]["compiled"]
    assert [each for each in found if each["shared"] > TARGETS[target]] == []
    # attention is tuned for sm_90: elsewhere it may spill a little, on AMD it has to compile
    attention = [each for each in found if each["kernel"].startswith("attention_") and target != "cuda-90"]
    tuned = [each for each in found if each not in attention]
    assert [each for each in tuned if each["local"]] == [], "registers are spilled or arrays lie in local memory"
    if not target.startswith("hip"):
        assert [each for each in attention if each["local"] > UNTUNED] == [], "more is spilled than a little"
    assert [each for each in found if each["warnings"]] == []


def test_any_integer_may_be_1(report, target):
    assert report[target]["ones"] == []


def test_registers_and_shared_memory_are_those_of_the_table(report, target):
    table = json.loads(REGISTERS.read_text())[target]
    version = ".".join(report["triton"].split(".")[:2])
    write = f"run: python tests/support/triton_gate.py {' '.join(TARGETS)} --write"
    found = {each["label"]: each for each in report[target]["compiled"]}
    if version not in table:
        pytest.skip(f"{REGISTERS.name} has Triton {', '.join(table)}, this is {version}; {write}")
    changed = sorted(found.keys() ^ table[version].keys())
    assert changed == [], f"the launches are not those of {REGISTERS.name}; {write}"
    more = [
        f"{label}: {each['registers']} registers and {each['shared']} bytes where the table has {table[version][label]}"
        for label, each in found.items()
        if each["registers"] > MORE * table[version][label][0] or each["shared"] > MORE * table[version][label][1]
    ]
    assert more == [], write

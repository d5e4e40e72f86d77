"""Peers' own suites on these kernels: no test fails that does not fail without them.

FLEXKERNELS_PEERS names a folder with their checkouts, under the names of their repositories. Takes minutes.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import flexkernels

# checkout: pytest's arguments in it
SUITES = {
    "torchdiffeq": ["-o", "python_files=*_tests.py", "tests"],
    "vector-quantize-pytorch": ["tests"],
}


def failures(checkout: Path, report: Path, *options: str) -> tuple[set[str], int, int]:
    """Names of the tests that fail, how many passed, and how many calls these kernels served."""
    support, root = Path(__file__).parents[2] / "support", Path(flexkernels.__file__).parents[1]
    paths = [checkout, checkout / "tests", support, root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", checkout, f"--junitxml={report}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))}
    run = subprocess.run([*command, *options], cwd=checkout, env=environment, capture_output=True, text=True)
    assert report.exists(), run.stdout + run.stderr
    failed, passed = set(), 0
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        if bad:
            failed.add(f"{case.get('classname')}.{case.get('name')}")
        passed += not bad and case.find("skipped") is None
    served = re.search(r"flexkernels served (\d+) calls", run.stdout)
    return failed, passed, int(served[1]) if served else 0


@pytest.mark.slow
@pytest.mark.parametrize("peer", SUITES)
def test_suite_of(peer, tmp_path):
    if not os.environ.get("FLEXKERNELS_PEERS"):
        pytest.skip("FLEXKERNELS_PEERS names no folder of checkouts")
    checkout = Path(os.environ["FLEXKERNELS_PEERS"], peer)
    if not checkout.is_dir():
        pytest.skip(f"{checkout} does not exist")
    theirs, passed, none = failures(checkout, tmp_path / "theirs.xml", *SUITES[peer])
    ours, passed_on_ours, served = failures(checkout, tmp_path / "ours.xml", "-p", "peer_plugin", *SUITES[peer])
    assert passed > 20 and none == 0 and served >= 10
    assert ours <= theirs, sorted(ours - theirs)
    assert passed_on_ours >= passed

"""The tests themselves: a test file is imported by nobody; what several of them share is in tests/support."""

import re

import pytest
from paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
TESTS = {path.stem for path in FILES if path.stem.startswith("test_")}
# also those of programs that a file holds as text
IMPORT = re.compile(r"^[ \t]*(?:from|import) .*$", re.MULTILINE)


def imported_tests(source: str) -> set[str]:
    return {name for line in IMPORT.findall(source) for name in re.findall(r"\w+", line)} & TESTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_no_file_imports_a_test_file(path):
    assert imported_tests(path.read_text()) == set()


def test_imports_are_recognised():
    name = min(TESTS)
    for line in (f"import {name}", f"from {name} import CASES", f"    from tests.kernels import {name} as other"):
        assert imported_tests(f"import os\n{line}\n") == {name}
    assert imported_tests(f"# see {name}\nfrom pathlib import Path\n") == set()

"""The pages of docs/: their Python runs as it stands, what they quote exists, their tables are those of the results."""

import json
import re
import shutil
from pathlib import Path

import pytest
import render
from paths import ROOT

import flexkernels
from vft.demo import CLIP

PAGES = sorted((ROOT / "docs").glob("*.md"))
SOURCES = [ROOT / "setup.py", *ROOT.glob("flexkernels/**/*.py"), *ROOT.glob("vft/**/*.py"), *ROOT.glob("csrc/*.cpp")]
# the info string of a block that needs other packages: ```python no-run
FENCE = re.compile(r"^```python *(no-run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r'(?:getenv\(|environ\[|environ\.get\(|environment\.get\(|ENVIRONMENT = )"(\w+)"')


def runnable(page: Path) -> list[str]:
    return [code for skip, code in FENCE.findall(page.read_text()) if not skip]


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    shutil.copy(CLIP, tmp_path / "in.mp4")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": page.name}
    for code in runnable(page):
        exec(compile(code, str(page), "exec"), scope)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_public_op_is_documented():
    text = (ROOT / "docs" / "kernels.md").read_text()
    ops = [n for n in flexkernels.__all__ if f"{n.removesuffix('_')}_ref" in dir(flexkernels) or n == "kv_append_"]
    assert len(ops) > 15
    assert [op for op in ops if f"`{op}(" not in text and f"`{op}`" not in text] == []


def test_every_environment_variable_is_documented():
    text = (ROOT / "docs" / "backends.md").read_text()
    read = {name for file in SOURCES for name in VARIABLE.findall(file.read_text()) if name}
    assert {"FLEXKERNELS_BACKEND", "FLEXKERNELS_CPU_CAPABILITY", "FLEXKERNELS_CHECK", "MAX_JOBS"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in text] == []


def test_quoted_errors_are_those_of_the_code():
    source = "".join(p.read_text() for p in SOURCES)
    # f-string fields become "...", neighbouring literals one
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    parts = {part.strip() for message in quoted for part in re.split(r"\.\.\.| must | needs | cannot ", message)}
    assert [part for part in sorted(parts) if len(part) > 9 and part not in source] == []


def test_benchmark_tables_are_rendered_from_the_stored_results():
    stored = json.loads((ROOT / "bench" / "results" / "cpu_epyc_avx512.json").read_text())
    table = render.markdown(stored)
    assert table in (ROOT / "docs" / "benchmarks.md").read_text()
    gpu = json.loads((ROOT / "bench" / "results" / "h200.json").read_text())
    assert render.markdown(gpu) in (ROOT / "docs" / "benchmarks.md").read_text()
    shown = re.findall(r"^\| `\w+` \| .*%\ \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert 6 <= len(shown) <= 10 and [row for row in shown if row not in table] == []

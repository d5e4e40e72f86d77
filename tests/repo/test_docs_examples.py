import runpy
import sys

import pytest
from paths import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "speedup.py"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_speedup_prints_its_table(monkeypatch, capsys):
    pytest.importorskip("vector_quantize_pytorch")
    pytest.importorskip("diffusers")
    run(monkeypatch, "--seconds", "0.01", "--scale", "0.05")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 7 and all(line.endswith("x") for line in lines[2:])


def test_speedup_stops_at_unequal_results(monkeypatch):
    import torch

    example = runpy.run_path(str(EXAMPLE))
    case = example["Case"]("wrong", [1], lambda: (torch.zeros(1),), lambda: (torch.ones(1),), 0.1)
    with pytest.raises(AssertionError):
        example["check"](case)

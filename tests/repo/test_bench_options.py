"""bench/options.py: what its rows count and print."""

import importlib

import pytest

import vft


@pytest.fixture(scope="module")
def options():
    return importlib.import_module("options")


def test_sequences_of_a_sample(options):
    assert options.sequences(40) == 80 and options.sequences(20, "ab2") == 40
    assert options.sequences(5, null_every=2) == 5 + 3 and options.sequences(40, guidance=None) == 40
    # of t = 1, 0.9, ..., 0.1
    scale = vft.solver.interval(3.0, 0.45, 0.85)
    assert options.sequences(10, guidance=vft.CFG(scale)) == 10 + 4


def test_rows_of_the_table(options, monkeypatch, capsys):
    rows = {"first": {"steps": 8}, "half": {"steps": 8, "null_every": 2}, "none": {"steps": 1, "guidance": None}}
    monkeypatch.setattr(options, "ROWS", rows)
    assert options.main(["--clips", "1", "--reference-steps", "8", "--seconds", "0.01"]) == 0
    _, _, first, half, none = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert first[:2] == ["first", "16"] and half[:2] == ["half", "12"] and none[:2] == ["none", "1"]
    # the first row is the reference itself
    assert float(first[2]) == 1 and float(first[3]) == 0 < float(half[3]) < 0.5 and float(none[3]) > 0
    assert all(10 < float(row[4]) < 40 for row in (first, half, none))

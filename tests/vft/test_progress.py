"""Progress off a terminal: lines, and none of short work."""

import io

import pytest

from vft import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds(clock, capsys):
    with progress.bar(desc="train", total=100, unit="step", initial=10) as bar:
        for _ in range(30):
            clock[0] += 1
            bar.set_postfix(loss="0.5", clips_per_second="3.0")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "train: step 20 of 100, loss 0.5, clips per second 3.0, 00:01:20 left"


def test_iterating_and_unknown_totals(clock, capsys):
    for _ in progress.bar(range(3), desc="clips", unit="batch"):
        clock[0] += 6
    bar = progress.bar(desc="encode", unit="frame")
    clock[0] += 11
    bar.update(7)
    assert capsys.readouterr().err == "clips: batch 2 of 3, 00:00:06 left\nencode: frame 7\n"


def test_short_or_hidden_work_prints_nothing(clock, capsys):
    for _ in progress.bar(range(3), desc="a", unit="b"):
        clock[0] += 1
    for _ in progress.bar(range(3), desc="a", unit="b", hidden=True):
        clock[0] += 11
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    for _ in progress.bar(range(3), desc="clips", unit="batch"):
        pass
    assert "clips:" in terminal.getvalue() and "\r" in terminal.getvalue()

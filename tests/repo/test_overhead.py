"""bench/overhead.py measures every call that it lists."""

import json

import overhead
import torch


def test_every_call_gets_a_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(overhead.measure, "__defaults__", (1, 2))
    overhead.main(["--json", str(tmp_path / "calls.json")])
    found = json.loads((tmp_path / "calls.json").read_text())["us_per_call"]
    assert {"F.rms_norm", "rms_norm", "flow_step", "attention"} <= found.keys()
    assert all(0 < microseconds < 1e6 for microseconds in found.values())
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(found)

"""bench/: what a run records, how two runs are compared, and that every peer names its source."""

import ast
import copy
import importlib
import json

import pytest
import torch
from paths import ROOT
from PIL import Image

from vft import measure

BENCH = ROOT / "bench"
STORED = BENCH / "results" / "cpu_epyc_avx512.json"
CASE = "sample_logits_plain_fp32"
H200 = BENCH / "results" / "h200.json"
# how a case was called: from Python, and under "graph" inside a CUDA graph
TIMES = {"ours_ms", "backends", "peers", "quartiles", "ratio", "fraction_of_bound", "failed"}
FIELDS = TIMES | {"name", "device", "dtype", "shape", "bound_ms", "correct", "note", "error", "graph"}


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/ by name, imported as its scripts import each other (pythonpath in pyproject.toml)."""
    return {name: importlib.import_module(name) for name in ("cases", "compare", "measuring", "render", "report")}


@pytest.fixture
def quick(bench, monkeypatch):
    """One small case and ceilings that need no measuring."""
    numbers = {"copy_gb_s": 10.0, "read_gb_s": 10.0, "gemm_fp32_gflop_s": 100.0, "gemm_bf16_gflop_s": 200.0}
    monkeypatch.setattr(bench["report"], "ceilings", lambda device, seconds=1: numbers)
    return ["--only", CASE, "--seconds", "0.05", "--device", "cpu"]


def test_a_run_writes_the_records_of_the_schema(bench, quick, tmp_path, capsys):
    target = tmp_path / "run.json"
    assert bench["report"].main([*quick, "--json", str(target)]) == 0
    (record,) = json.loads(target.read_text())["records"]
    assert record.keys() == FIELDS and json.loads(capsys.readouterr().out) == record
    assert record["name"] == CASE and record["shape"] == [2, 64000] and record["correct"] is True
    assert record["bound_ms"] == pytest.approx(2 * 64000 * 4 / 10e6)
    assert record["fraction_of_bound"] == pytest.approx(record["bound_ms"] / record["ours_ms"])
    assert record["ratio"] == pytest.approx(min(record["peers"].values()) / record["ours_ms"])
    assert record["quartiles"].keys() == {"ours", *record["peers"]}
    for name, ms in {"ours": record["ours_ms"], **record["peers"]}.items():
        low, high = record["quartiles"][name]
        assert 0 < low <= ms <= high


def test_a_wrong_result_is_not_timed(bench, quick, tmp_path, monkeypatch):
    def broken(device):
        made = made_of(device)
        made.check = lambda: "off by one"
        made.ours = None
        return made

    made_of = bench["cases"].CASES[CASE]
    monkeypatch.setitem(bench["cases"].CASES, CASE, broken)
    target = tmp_path / "run.json"
    assert bench["report"].main([*quick, "--json", str(target), "--markdown"]) == 1
    (record,) = json.loads(target.read_text())["records"]
    assert record["ours_ms"] is None and record["note"] == "WRONG: off by one" and record["quartiles"] == {}


def test_a_case_that_raises_is_a_record_and_the_next_one_is_measured(bench, quick, tmp_path, monkeypatch, capsys):
    def raising(device):
        raise RuntimeError("no such layout")

    other = "sample_logits_top_p_fp32"
    monkeypatch.setitem(bench["cases"].CASES, CASE, raising)
    arguments = [quick[0], CASE, other, *quick[2:], "--json", str(tmp_path / "run.json"), "--markdown"]
    assert bench["report"].main(arguments) == 1
    records = {record["name"]: record for record in json.loads((tmp_path / "run.json").read_text())["records"]}
    assert not records[CASE]["correct"] and "RuntimeError: no such layout" in records[CASE]["error"]
    assert records[CASE].keys() == FIELDS and records[other]["ours_ms"] > 0
    assert f"| `{CASE}` |  | - | **RAISED: RuntimeError: no such layout** | - |" in capsys.readouterr().out


def test_a_peer_that_raises_is_named_beside_those_that_do_not(bench, quick, monkeypatch):
    def with_peer(device):
        made = made_of(device)
        made.peers["raises"] = lambda: torch.zeros(2) @ torch.zeros(3)
        return made

    made_of = bench["cases"].CASES[CASE]
    numbers = bench["report"].ceilings("cpu")
    record = bench["measuring"].record_of(CASE, lambda: with_peer("cpu"), "cpu", numbers, 0.05)
    assert record["correct"] and record["failed"].keys() == {"raises"} and "RuntimeError" in record["failed"]["raises"]
    assert record["peers"].keys() == {"softmax and multinomial"}


def test_a_run_is_resumed_and_ends_in_time(bench, quick, tmp_path, capsys):
    target, more = str(tmp_path / "run.json"), ["--json", str(tmp_path / "run.json"), "--resume"]
    assert bench["report"].main([*quick, "--json", target]) == 0
    (first,) = json.loads((tmp_path / "run.json").read_text())["records"]
    both = [quick[0], CASE, "sample_logits_top_p_fp32", *quick[2:], *more]
    assert bench["report"].main([*both, "--budget", "1e-9"]) == 0
    assert "out of time, not measured: sample_logits_top_p_fp32" in capsys.readouterr().err
    assert bench["report"].main(both) == 0
    records = json.loads((tmp_path / "run.json").read_text())["records"]
    assert records[0] == first and [r["name"] for r in records] == [CASE, "sample_logits_top_p_fp32"]


@pytest.mark.parametrize("name", ["h200.json", "cpu_epyc_avx512.json"])
def test_stored_results_are_shown_with_load(bench, name, capsys):
    bench["report"].main(["--load", str(BENCH / "results" / name)])
    stored, shown = json.loads((BENCH / "results" / name).read_text()), capsys.readouterr().out
    assert all(f"| `{record['name']}` |" in shown for record in stored["records"])
    assert stored["machine"]["commit"] in shown


def test_a_stored_gpu_run_has_both_times_where_and_when(bench):
    stored = json.loads(H200.read_text())
    assert stored["machine"]["gpu"] == "NVIDIA H200" and stored["machine"]["date"] == "2026-11-27"
    records = {record["name"]: record for record in stored["records"]}
    assert all(record.keys() == FIELDS for record in stored["records"])
    assert all(record["graph"].keys() == TIMES for record in stored["records"] if record["graph"])
    norm = records["adaln_norm_bf16"]
    assert norm["graph"]["ours_ms"] < norm["ours_ms"] / 2 and norm["graph"]["backends"].keys() == {"triton", "cuda"}
    shown = bench["render"].markdown(stored)
    assert "| `adaln_norm_bf16` | 2,560 x 1,792 | 13 us | 5.18 us |" in shown
    assert "| tokenizer decode, batch 1, keep 32 | 0.5 s a clip |" in shown


def test_only_names_cases(bench):
    assert bench["report"].chosen(["skinny_linear_head_rows?_bf16"], bench["cases"].CASES) == [
        f"skinny_linear_head_rows{n}_bf16" for n in (1, 3, 4)
    ]
    with pytest.raises(SystemExit, match="--only must name a case"):
        bench["report"].main(["--only", "nothing"])


def run_of(ours: float, peer: float, spread: float = 0.02) -> dict:
    """A report of one case; quartiles lie `spread` around the medians."""
    record = {
        "name": "op", "device": "cpu", "dtype": "float32", "shape": [2], "ours_ms": ours, "peers": {"plain": peer},
        "quartiles": {n: [t * (1 - spread), t * (1 + spread)] for n, t in (("ours", ours), ("plain", peer))},
        "correct": True, "note": "",
    }  # fmt: skip
    machine = {"device": "cpu", "processor": "x", "gpu": None, "threads": 2}
    return {"machine": machine, "records": [record]}


@pytest.mark.parametrize(
    ("new", "regressions"),
    [
        (run_of(1.0, 5.0), 0),
        (run_of(1.08, 5.0), 0),
        (run_of(1.3, 5.0), 1),
        # the whole machine is slower, or ours more than that
        (run_of(1.3, 6.5), 0),
        (run_of(2.0, 6.5), 1),
        # peers that became faster say nothing against ours
        (run_of(1.0, 2.0), 0),
        # within the noise of the turns
        (run_of(1.3, 5.0, spread=0.4), 0),
    ],
)
def test_compare_flags_what_is_slower_beyond_noise(bench, new, regressions):
    lines, found = bench["compare"].compare(run_of(1.0, 5.0), new)
    assert found == regressions and len(lines) == 1
    assert ("REGRESSION" in lines[0]) == bool(regressions)


def test_compare_flags_a_result_that_is_now_wrong(bench):
    new = run_of(1.0, 5.0)
    new["records"][0] |= {"correct": False, "note": "WRONG: x", "ours_ms": None}
    assert bench["compare"].compare(run_of(1.0, 5.0), new) == (["op: REGRESSION, WRONG: x"], 1)
    other = copy.deepcopy(new)
    other["records"][0]["name"] = "new"
    assert bench["compare"].compare(run_of(1.0, 5.0), other) == (["new: not in the earlier report"], 0)


def test_compare_refuses_other_machines_and_reports_without_quartiles(bench):
    other = run_of(1.0, 5.0)
    other["machine"]["threads"] = 4
    with pytest.raises(ValueError, match="threads must be the same to compare, got 2 and 4"):
        bench["compare"].compare(run_of(1.0, 5.0), other)
    bare = run_of(1.0, 5.0)
    del bare["records"][0]["quartiles"]
    with pytest.raises(ValueError, match="must hold the quartiles"):
        bench["compare"].compare(bare, other | {"machine": bare["machine"]})


def test_exit_code_of_a_regression(bench, tmp_path, capsys):
    numbers = {"copy_gb_s": 1, "read_gb_s": 1, "gemm_fp32_gflop_s": 1, "gemm_bf16_gflop_s": 1}
    for name, report in {"old": run_of(1.0, 5.0), "new": run_of(1.5, 5.0)}.items():
        (tmp_path / name).write_text(json.dumps(report | {"ceilings": numbers}))
    arguments = ["--load", str(tmp_path / "new"), "--compare"]
    assert bench["report"].main([*arguments, str(tmp_path / "old")]) == 1
    assert capsys.readouterr().out == "op: REGRESSION, 1 -> 1.5 ms (1.50x the time; its peers 1.00x)\n"
    assert bench["report"].main([*arguments, str(tmp_path / "new")]) == 0


def test_plot_of_the_stored_results(bench, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench["report"].main(["--load", str(STORED), "--only", "fsq_*", "--plot", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 800 and len(picture.getcolors(2**24)) > 10


def test_turns_end_early_for_slow_cases_alone():
    enough = measure._enough
    assert not enough(100, 0.9, 1.0) and enough(7, 1.0, 1.0)
    assert not enough(6, 2.9, 1.0) and enough(3, 3.0, 1.0) and not enough(2, 30.0, 1.0)


def test_median_and_quartiles():
    timing = measure._timing([0.005, 0.001, 0.003, 0.002, 0.004])
    assert timing == pytest.approx((3, 2, 4))


def test_every_public_op_has_a_case(bench):
    import flexkernels

    ops = {name for name in flexkernels.__all__ if f"{name.removesuffix('_')}_ref" in dir(flexkernels)}
    ops |= {"kv_append_"}
    cases = bench["cases"].CASES
    assert len(ops) > 10
    assert [op for op in sorted(ops) if not any(name.startswith(op.removesuffix("_")) for name in cases)] == []


@pytest.mark.parametrize("path", sorted((BENCH / "peers").glob("*.py")), ids=lambda p: p.stem)
def test_every_peer_names_its_source(path):
    peers = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert peers or path.stem == "__init__"
    assert [n.name for n in peers if "Source: " not in (ast.get_docstring(n) or "")] == []


def test_bound_is_by_memory_or_by_arithmetic():
    numbers = {"copy_gb_s": 20.0, "read_gb_s": 40.0, "gemm_fp32_gflop_s": 100.0, "gemm_bf16_gflop_s": 200.0}
    bound = measure.bound_ms
    assert bound(20_000_000, 0, torch.float32, numbers) == 1.0
    assert bound(20_000_000, 0, torch.float32, numbers, "read") == 0.5
    assert bound(0, 100_000_000, torch.float32, numbers) == 1.0
    assert bound(0, 100_000_000, torch.bfloat16, numbers) == 0.5

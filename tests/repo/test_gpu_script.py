"""bench/gpu.sh with the CPU in the GPU's place, stage by stage; and its parts."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from paths import ROOT

import flexkernels
import vft

STAGES = ["build", "info", "tests", "memcheck", "racecheck", "warm", "report", "models", "tune"]


@pytest.fixture(scope="module")
def gpu():
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with the built objects of the flexkernels that is installed."""
    folder = tmp_path_factory.mktemp("checkout") / "flexkernels"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "__pycache__", "*.so"))
    for built in Path(flexkernels.__file__).parent.glob("*.so"):
        shutil.copy(built, folder / "flexkernels")
    return folder


@pytest.fixture(scope="module")
def ran(checkout, tmp_path_factory):
    """One call of the script on the stand-in: (its folder, the finished process)."""
    out = tmp_path_factory.mktemp("gpu")
    names = {"PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "TRITON_INTERPRET"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"FLEXKERNELS_GPU_STANDIN": "cpu", "PYTHON": sys.executable}
    command = ["bash", str(checkout / "bench" / "gpu.sh"), str(out)]
    return out, subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_stage_is_well_and_in_the_summary(ran):
    out, done = ran
    summary = (out / "summary.txt").read_text()
    logs = {stage: (out / f"{stage}.log").read_text()[-2000:] for stage in STAGES if (out / f"{stage}.log").exists()}
    assert done.returncode == 0, f"{summary}\n{logs}"
    rows = [line.split()[:2] for line in summary.splitlines()[1:]]
    assert rows == [[stage, "ok"] for stage in STAGES]
    assert summary in done.stdout


def test_what_the_stages_leave(ran):
    out, _ = ran
    tests = json.loads((out / "tests.json").read_text())
    assert tests["passed"] > 10 and tests["failed"] == 0 and tests["in_time"] and tests["slowest"]
    assert (out / "failures.txt").read_text() == ""
    report = json.loads((out / "report.json").read_text())
    (record,) = report["records"]
    assert record["correct"] and record["ours_ms"] > 0 and record["graph"]["ours_ms"] > 0
    assert record["graph"]["backends"].keys() == {"reference", "cpu"}
    assert record["name"] in (out / "report.md").read_text()
    assert all("0 wrong" in (out / f"{tool}.log").read_text() for tool in ("memcheck", "racecheck"))
    runs = {run["name"] for run in json.loads((out / "runs.json").read_text())}
    assert any("tokenizer decode" in r for r in runs) and any("VidTok" in r for r in runs)
    assert any("generate()" in r for r in runs)


def test_the_fastest_right_tiles_reach_the_table(ran):
    out, _ = ran
    table = json.loads((out / "tuning" / "sm_90.json").read_text())
    # the first entry is not taken by the case; the second one's best is known, and a faster one is wrong
    assert [entry["use"]["block"] for entry in table["entries"]["standin"]] == [8, 64]
    tried = {row["tiles"]["block"] for row in json.loads((out / "tuning" / "tiles.json").read_text())}
    assert tried == {32, 64}


def stage(gpu, name, seconds, command):
    return gpu.Stage(name, seconds, lambda out, log, left: gpu.call([sys.executable, "-c", command], log, left))


def test_a_failed_and_a_late_stage_do_not_stop_the_next(gpu, tmp_path, capsys):
    def raising(out, log, seconds):
        raise OSError("no such tool")

    chosen = [
        stage(gpu, "fails", 20, "raise SystemExit('no GPU')"),
        gpu.Stage("raises", 0, raising),
        stage(gpu, "works", 20, "print('fine')"),
    ]
    assert gpu.run(chosen, tmp_path) == 1
    rows = [line.split(maxsplit=4) for line in (tmp_path / "summary.txt").read_text().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["fails", "FAIL"], ["raises", "FAIL"], ["works", "ok"]]
    assert "no GPU" in (tmp_path / "fails.log").read_text()
    assert "OSError: no such tool" in (tmp_path / "raises.log").read_text()


def test_without_a_build_nothing_is_measured(gpu, tmp_path):
    asked = []
    stages = [gpu.Stage("build", 5, lambda *_: 1), gpu.Stage("tests", 5, lambda *_: asked.append("tests") or 0)]
    assert gpu.run(stages, tmp_path) == 1 and asked == []
    assert (tmp_path / "summary.txt").read_text().splitlines()[1].split()[:3] == ["build", "FAIL", "1"]


def test_a_stage_ends_in_time_with_all_its_processes(gpu, tmp_path):
    child = "import time; time.sleep(60)"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', '{child}'])"
    start = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        assert gpu.call([sys.executable, "-c", program], log, 4) == gpu.TIMEOUT
    assert time.monotonic() - start < 4 + 2 * gpu.GRACE
    assert "begun" in (tmp_path / "log").read_text()


def test_time_that_a_stage_leaves_is_there_for_the_next(gpu, tmp_path):
    given = []
    note = lambda out, log, seconds: given.append(seconds) or 0  # noqa: E731
    assert gpu.run([gpu.Stage("a", 30, note), gpu.Stage("b", 20, note)], tmp_path) == 0
    assert given[0] == pytest.approx(30, abs=1) and given[1] == pytest.approx(50, abs=2)


@pytest.mark.slow
def test_models_are_trained_in_the_time_there_is(checkout, tmp_path):
    environment = os.environ | {"FLEXKERNELS_GPU_STANDIN": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(checkout / "bench" / "gpu.sh"), str(tmp_path), "--only", "train"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (tmp_path / "train.log").read_text()[-2000:]
    assert done.stdout.count("== ") == 1
    for name in ("first", "taught", "decoder", "tokenizer", "generator"):
        steps = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        # nearly all of its fall, to 2%, and a last step before
        assert steps[-1]["lr"] < 0.1 * max(step["lr"] for step in steps), name
        assert (tmp_path / name / "model.safetensors").is_file()
    tokenizer = vft.Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.registers == 128 and tokenizer.codec.refiner is not None
    # the decoder and the refiner leave the tokens as they are
    assert tokenizer.fingerprint == vft.Tokenizer.from_pretrained(tmp_path / "taught").fingerprint
    assert vft.Generator.from_pretrained(tmp_path / "generator").config.fingerprint == tokenizer.fingerprint
    assert json.loads((tmp_path / "eval.json").read_text())["rate_distortion"]


def test_all_stages_fit_into_nine_minutes(gpu):
    assert [each.name for each in gpu.stages(None)] == STAGES
    assert sum(each.seconds for each in gpu.stages(None)) <= 535


def test_built_objects_travel_and_nothing_else_does(gpu, tmp_path):
    for folder in ("from/flexkernels", "to/flexkernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "from/flexkernels/_C.so").write_bytes(b"object")
    (tmp_path / "from/flexkernels/norm.py").touch()
    assert gpu.pack(tmp_path / "from", tmp_path / "build.tgz") == ["_C.so"]
    assert gpu.unpack(tmp_path / "build.tgz", tmp_path / "to") == ["flexkernels/_C.so"]
    assert (tmp_path / "to/flexkernels/_C.so").read_bytes() == b"object"
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.add(tmp_path / "from/flexkernels/norm.py", "setup.py")
    with pytest.raises(ValueError, match=r"archive of flexkernels/\*.so, got one of setup.py"):
        gpu.unpack(tmp_path / "other.tgz", tmp_path / "to")


SUITE = """
import gpu_tests, pytest
DEVICE = "cuda"
@pytest.mark.parametrize("place", ["cpu-cpu", "reference-cuda", "triton-cuda", "cuda-cuda"])
def test_a(place):
    assert place != "cuda-cuda", "seven is not eight"
def test_train():
    # the time is over
    gpu_tests.END = 0
def test_train_again():
    raise AssertionError
"""


@pytest.mark.parametrize("more", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_failures_are_written_and_the_summary_comes_when_time_is_over(tmp_path, more):
    if more:
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(SUITE)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "bench"),
        "FLEXKERNELS_GPU_TESTS": str(tmp_path / "out"),
        "FLEXKERNELS_GPU_STANDIN": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_tests", *more, "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    counts = json.loads((tmp_path / "out" / "tests.json").read_text())
    # the CPU's own place is deselected; the last one never begins
    assert (counts["passed"], counts["failed"]) == (3, 1), done.stdout
    assert "out of time" in done.stdout and "3 passed, 1 failed" in done.stdout
    failures = (tmp_path / "out" / "failures.txt").read_text()
    assert "test_a[cuda-cuda]" in failures and "seven is not eight" in failures and "def test_a(place)" in failures


def test_order_and_place_of_tests():
    plugin = importlib.import_module("gpu_tests")
    names = [
        "tests/vft/test_generator.py::test_x", "tests/kernels/test_norm.py::test_a[triton-cuda]",
        "tests/kernels/test_norm.py::test_opcheck[cuda-cuda]", "tests/kernels/test_norm.py::test_a[cuda-cuda]",
        "tests/kernels/attention/test_attention_op.py::test_b",
    ]  # fmt: skip
    assert [names.index(name) for name in sorted(names, key=plugin.rank)] == [3, 1, 4, 0, 2]
    attention = ROOT / "tests" / "kernels" / "attention" / "test_triton_kernels.py"
    assert plugin.has_place(f"{attention}::test_forward[bf16]", attention.stem, attention.read_text())
    assert not plugin.has_place("test_norm.py::test_a[cpu-cpu]", "test_norm", "DEVICE")
    assert not plugin.has_place("test_build.py::test_unknown_mode", "test_build", "no device here")

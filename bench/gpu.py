"""Settles a GPU machine: builds, tests, sanitizes, measures and tunes, each within its time.

    bash bench/gpu.sh FOLDER [--build FILE.tgz] [--only STAGE ...]

FOLDER gets the output of each stage as STAGE.log, written as it comes, and

    summary.txt     a line a stage: result, seconds, its last line; written anew after each
    build.tgz       the built objects: --build brings them back in a later call, which then builds nothing
    failures.txt    every failed test with its traceback, as it fails; tests.json: counts and seconds so far
    report.json     bench/report.py, case by case; report.md and report.png
    runs.json       whole models at their real size (bench/models.py)
    tuning/         tables of tiles for flexkernels/tuning (bench/tune.py)
    tokenizer/, generator/   with --only train: the embedded models anew (and the runs on the way to them), eval.json:
                    their rate and distortion

A failed build ends the run, another failed stage does not stop the later ones; the exit code is then 1. Time that a
stage leaves is there for the next.
FLEXKERNELS_GPU_STANDIN=cpu runs the same stages on the CPU, on a few small cases: to try this script without a GPU.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STANDIN = os.environ.get("FLEXKERNELS_GPU_STANDIN") == "cpu"
PYTHON = sys.executable
# exit codes: of `timeout` by convention, and of report.py where the device was lost
TIMEOUT, DEVICE_LOST = 124, 3
# from SIGTERM to SIGKILL
GRACE = 5


@dataclass(frozen=True)
class Stage:
    """seconds: what it may take; run(out, log, seconds) -> exit code, at most so long."""

    name: str
    seconds: float
    run: Callable


def call(command: list, log, seconds: float, **environment) -> int:
    """The exit code of a command whose output goes to `log`; TIMEOUT where it took longer, with all its processes."""
    names = {name: str(value) for name, value in environment.items()}
    arguments = [str(part) for part in command]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | names, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(1, seconds))
    except subprocess.TimeoutExpired:
        for signal, patience in ((15, GRACE), (9, None)):
            os.killpg(process.pid, signal)
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        return TIMEOUT


def cores() -> int:
    return len(os.sched_getaffinity(0))


def pack(root: Path, file: Path) -> list[str]:
    """The built objects of `root` as an archive; their names."""
    found = sorted(path.name for path in (root / "flexkernels").glob("*.so"))
    with tarfile.open(file, "w:gz") as archive:
        for name in found:
            archive.add(root / "flexkernels" / name, f"flexkernels/{name}")
    return found


def unpack(file: Path, root: Path) -> list[str]:
    """Brings such objects back; their names. Raises ValueError for an archive of anything else."""
    with tarfile.open(file) as archive:
        names = archive.getnames()
        wrong = [name for name in names if not (Path(name).parent == Path("flexkernels") and name.endswith(".so"))]
        if wrong or not names:
            held = ", ".join(names) or "nothing"
            raise ValueError(f"--build must name an archive of flexkernels/*.so, got one of {held}")
        for name in names:
            (root / name).write_bytes(archive.extractfile(name).read())
    return names


def build(given: Path | None):
    def run(out: Path, log, seconds: float) -> int:
        if given is not None:
            log.write(f"brought back {', '.join(unpack(given, ROOT))}\n")
            return 0
        if STANDIN:
            command = [PYTHON, "setup.py", "-q", "build", "--build-base", out / "build"]
            code = call(command, log, seconds, FLEXKERNELS_BUILD="off")
        else:
            # code for the GPU at hand alone: a build for all architectures takes minutes
            command = [PYTHON, "setup.py", "build_ext", "--inplace"]
            code = call(command, log, seconds, FLEXKERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST=architecture())
        if code == 0:
            names = pack(ROOT, out / "build.tgz")
            print(f"packed {', '.join(names) or 'nothing'}", file=log, flush=True)
        return code

    return run


def architecture() -> str:
    """As torch spells it: 8.0, 9.0a, 10.0."""
    program = "import torch; c = torch.cuda.get_device_capability(); print('%d.%d%s' % (*c, 'a' * (c == (9, 0))))"
    return subprocess.run([PYTHON, "-c", program], capture_output=True, text=True).stdout.strip()


def info(out: Path, log, seconds: float) -> int:
    code = call([PYTHON, "-m", "flexkernels.info"], log, seconds)
    program = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 'no NVIDIA GPU')"
    return code if STANDIN else code or call([PYTHON, "-c", program], log, seconds)


def tests(out: Path, log, seconds: float) -> int:
    """What has a place on the GPU, our own kernels first; the plugin writes failures as they come and ends in time."""
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_tests", "--tb=short"]
    if importlib.util.find_spec("xdist") and not STANDIN:
        command += ["-n", min(12, cores())]
    command += ["tests/kernels/test_skinny_linear.py", "-k", "cpu-cpu"] if STANDIN else ["tests/kernels", "tests/vft"]
    environment = {"FLEXKERNELS_GPU_TESTS": out, "FLEXKERNELS_GPU_END": time.time() + seconds - 2 * GRACE}
    return call(command, log, seconds, **environment)


def sanitizer(tool: str):
    def run(out: Path, log, seconds: float) -> int:
        if STANDIN:
            return call([PYTHON, "bench/sanitize.py", "--backend", "cpu"], log, seconds)
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        found = shutil.which("compute-sanitizer") or f"{home}/bin/compute-sanitizer"
        if not Path(found).exists():
            log.write("compute-sanitizer not found: put it on PATH or set CUDA_HOME\n")
            return 1
        known = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
        # ours alone: torch's kernels take most of the time and are not to be judged here
        option = next((name for name in ("--kernel-name", "--kernel-regex") if name in known), None)
        ours = [option, "kernel_substring=flexkernels"] if option else []
        command = [found, "--tool", tool, *ours, "--error-exitcode", "1", PYTHON, "bench/sanitize.py"]
        # each tensor an allocation of its own, so that a step over its end is seen
        return call(command, log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING=1)

    return run


def cases() -> list[str]:
    return ["--device", "cpu", "--only", "kv_append_fp32"] if STANDIN else ["--device", "cuda"]


def warm(out: Path, log, seconds: float) -> int:
    processes = 1 if STANDIN else min(14, cores())
    return call([PYTHON, "bench/report.py", *cases(), "--warm", processes, "--budget", seconds - 20], log, seconds)


def report(out: Path, log, seconds: float) -> int:
    end, file = time.monotonic() + seconds, out / "report.json"
    command = [PYTHON, "bench/report.py", *cases(), "--seconds", "0.1", "--json", file, "--resume", "--budget"]
    code = DEVICE_LOST
    while code == DEVICE_LOST and end > time.monotonic():
        left = end - time.monotonic()
        code = call([*command, max(1, left - 10)], log, left)
    if file.exists():
        with open(out / "report.md", "w") as table:
            call([PYTHON, "bench/report.py", "--load", file], table, 30)
        if importlib.util.find_spec("matplotlib"):
            call([PYTHON, "bench/report.py", "--load", file, "--plot", out / "report.png"], log, 30)
    return code


def models(out: Path, log, seconds: float) -> int:
    return call([PYTHON, "bench/models.py", "--json", out / "runs.json", "--budget", seconds - 5], log, seconds)


def tune(out: Path, log, seconds: float) -> int:
    processes = 1 if STANDIN else min(14, cores())
    command = [PYTHON, "bench/tune.py", "--folder", out / "tuning", "--processes", processes, "--budget", seconds - 5]
    return call(command, log, seconds)


# seconds of a run whose pace tells how many steps there is time for (of which the first step takes 26 on an H200, where
# it compiles), and that loading and saving take
PACE, AROUND = (2, 16) if STANDIN else (35, 15)
# The way of docs/models.md: (folder, share of the time, kind of run, options, {option: the folder of a run before})
LAPPED = ["--codec", "lapped", "--recipe", "2", "--edges", "4"]
MORE_REGISTERS = ["--registers", "128", "--teach", "--recipe", "2", "--learning-rate", "2e-3"]
ITS_DECODER = ["--freeze-encoder", "--recipe", "2", "--edges", "4", "--early", "0.4", "--learning-rate", "1.2e-3"]
RUNS = (
    ("first", 0.28, "tokenizer", [*LAPPED, "--registers", "32", "--early", "0.5"], {}),
    ("taught", 0.2, "tokenizer", MORE_REGISTERS, {"--from": "first"}),
    ("decoder", 0.16, "tokenizer", ITS_DECODER, {"--from": "taught"}),
    ("tokenizer", 0.15, "refiner", ["--recipe", "2"], {"--tokenizer": "decoder"}),
    ("generator", 0.15, "generator", ["--tokens-per-frame", "24"], {"--tokenizer": "tokenizer"}),
)
# steps are few in the stand-in, whose rates would not fall
SIZES = (
    ["--batch", "2", "--clips", "4", "--warmup", "1"]
    if STANDIN
    else ["--batch", "128", "--clips", "60000", "--bf16", "--warmup", "50"]
)


def train_one(kind: str, options: list, folder: Path, log, seconds: float) -> int:
    """A run of `vft train` that ends in time, its learning rate at the end of its fall."""
    end = time.monotonic() + seconds
    command = [PYTHON, "-m", "vft", "train", kind, "-o", folder, *options, *SIZES]
    code = call([*command, "--steps", "1000000", "--minutes", PACE / 60], log, seconds)
    if code == 0:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        first, last = lines[len(lines) // 2], lines[-1]
        pace = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
        if len(lines) < 2:
            pace = last["seconds"]
        steps = last["step"] + max(1, int((end - time.monotonic() - AROUND) / max(pace, 1e-3)))
        # in case the pace falls: a run that stops by itself keeps its state
        minutes = max(0.1, end - time.monotonic() - AROUND / 2) / 60
        code = call([*command, "--steps", steps, "--minutes", minutes], log, end - time.monotonic())
    return code


def train(out: Path, log, seconds: float) -> int:
    """The runs of RUNS, then what the tokenizer is worth on a few clips, in the time that is left."""
    end = time.monotonic() + seconds
    for name, share, kind, options, before in RUNS:
        given = [part for option, folder in before.items() for part in (option, out / folder)]
        if code := train_one(kind, [*options, *given], out / name, log, share * seconds):
            return code
    command = [PYTHON, "-m", "vft", "eval", "--model", out / "tokenizer", "-o", out / "eval.json", "--clips"]
    return call([*command, 4 if STANDIN else 8], log, end - time.monotonic())


def stages(given: Path | None) -> list[Stage]:
    """530 seconds on a GPU."""
    return [
        Stage("build", 80, build(given)),
        Stage("info", 20, info),
        Stage("tests", 110, tests),
        Stage("memcheck", 30, sanitizer("memcheck")),
        Stage("racecheck", 30, sanitizer("racecheck")),
        Stage("warm", 50, warm),
        Stage("report", 100, report),
        Stage("models", 60, models),
        Stage("tune", 50, tune),
    ]


# only where --only names them
MORE = [Stage("train", 300 if STANDIN else 500, train)]


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:110] if lines else ""


def run(chosen: list[Stage], out: Path) -> int:
    """Runs the stages one after the other and writes the summary after each; 1 where one failed."""
    rows, began, allowed = [f"{'stage':10} {'result':8} {'seconds':>8}  last line"], time.monotonic(), 0.0
    failed = False
    for stage in chosen:
        print(f"== {stage.name}", flush=True)
        allowed += stage.seconds
        start, path = time.monotonic(), out / f"{stage.name}.log"
        with open(path, "w", buffering=1) as log:
            try:
                code = stage.run(out, log, allowed - (start - began))
            except Exception as error:
                log.write(f"{type(error).__name__}: {error}\n")
                code = 1
        failed = failed or code != 0
        result = "ok" if code == 0 else "TIMEOUT" if code == TIMEOUT else f"FAIL {code}"
        rows.append(f"{stage.name:10} {result:8} {time.monotonic() - start:8.0f}  {last_line(path)}")
        print(rows[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(rows) + "\n")
        if stage.name == "build" and code != 0:
            # minutes of a GPU without its kernels would say little
            break
    print("\n" + "\n".join(rows))
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--build", type=Path, metavar="FILE.tgz", help="objects of an earlier call, in place of a build"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[s.name for s in stages(None) + MORE])
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    given = options.build and options.build.resolve()
    chosen = [s for s in stages(given) + MORE if s.name in options.only] if options.only else stages(given)
    return run(chosen, options.out)


if __name__ == "__main__":
    sys.exit(main())

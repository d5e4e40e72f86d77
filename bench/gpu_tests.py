"""A pytest plugin for a GPU machine (-p gpu_tests): what has a place there, our own kernels first, and nothing lost.

FLEXKERNELS_GPU_TESTS  a folder: failures.txt gets every failure with its traceback as it comes, tests.json the counts
FLEXKERNELS_GPU_END    time.time() after which no further test begins; the summary is written as ever
"""

import json
import os
import time
from pathlib import Path

OUT = Path(os.environ.get("FLEXKERNELS_GPU_TESTS", "."))
END = float(os.environ.get("FLEXKERNELS_GPU_END", "inf"))
STANDIN = os.environ.get("FLEXKERNELS_GPU_STANDIN") == "cpu"
# what a test file says where its tests run on a GPU if there is one
ON_DEVICE = ("DEVICE", "on_every_backend", "needs_gpu", '"cuda"')
# what these do takes long, or little of it is ours
SLOW = ("compile", "inductor", "opcheck", "gradcheck", "golden", "published", "train")
# files whose tests start processes, read videos or compile for other machines
ELSEWHERE = ("test_triton_compile", "test_cuda_compile", "test_video", "test_cli", "emulat")


class Progress:
    """Counts of outcomes, and failures as they come; in the controlling process alone."""

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.counts, self.seconds = out, {"passed": 0, "failed": 0, "skipped": 0}, {}
        self.failures = open(out / "failures.txt", "w", buffering=1)  # noqa: SIM115

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            self.seconds[report.nodeid] = round(report.duration, 2)
        if report.outcome == "failed":
            self.failures.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
        self.write()

    def write(self):
        slowest = dict(sorted(self.seconds.items(), key=lambda pair: -pair[1])[:30])
        text = json.dumps({**self.counts, "in_time": time.time() < END, "slowest": slowest}, indent=1)
        (self.out / "tests.json").write_text(text + "\n")

    def pytest_sessionfinish(self):
        self.write()
        self.failures.close()

    def pytest_terminal_summary(self, terminalreporter):
        late = "" if time.time() < END else "; out of time, not all ran"
        terminalreporter.write_line(", ".join(f"{n} {outcome}" for outcome, n in self.counts.items()) + late)


class Deadline:
    """Ends the session once the time is over; in every process that runs tests."""

    def __init__(self, session):
        self.session = session

    def pytest_runtest_logfinish(self):
        if time.time() > END and not self.session.shouldstop:
            self.session.shouldstop = "out of time"


def pytest_sessionstart(session):
    session.config.pluginmanager.register(Deadline(session), "gpu-deadline")
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Progress(OUT), "gpu-progress")


def pytest_collection_modifyitems(config, items):
    texts = {}
    kept, left = [], []
    for item in items:
        text = texts.setdefault(item.path, item.path.read_text())
        (kept if has_place(item.nodeid, item.path.stem, text) else left).append(item)
    items[:] = sorted(kept, key=lambda item: (rank(item.nodeid), item.path.name))
    if left:
        config.hook.pytest_deselected(items=left)


def has_place(nodeid: str, stem: str, text: str) -> bool:
    """Whether a test touches the GPU: not one whose parameters name the CPU alone."""
    if STANDIN:
        return True
    return (
        not any(name in stem for name in ELSEWHERE)
        and not any(name in nodeid.partition("[")[2] for name in ("cpu-cpu", "emulat"))
        and any(word in text for word in ON_DEVICE)
    )


def rank(nodeid: str) -> int:
    """0: CUDA C++, 1: Triton, 2: other kernel tests, 3: models; 4 and more: the slow ones of each."""
    if "cuda-cuda" in nodeid:
        place = 0
    elif "triton" in nodeid:
        place = 1
    else:
        place = 3 if "tests/vft" in nodeid else 2
    return place + 4 * any(word in nodeid for word in SLOW)

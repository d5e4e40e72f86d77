"""How one case is measured: correctness first, then its contenders in turns, eagerly and inside CUDA graphs."""

import contextlib
import traceback
from collections.abc import Callable, Iterator

import torch
from cases import Case
from graphs import STANDIN, captured

import flexkernels
from flexkernels import library
from vft.measure import alternate, bound_ms, synchronize, turn

# forced one by one inside graphs, to see which `auto` should take
BACKENDS = ("reference", "cpu") if STANDIN else ("triton", "cuda")


def record_of(name: str, make: Callable[[], Case], device: str, ceiling: dict, seconds: float) -> dict:
    """The record of a case; where anything of it raises, one that says so."""
    record = {
        "name": name, "device": device, "dtype": None, "shape": [], "correct": False, "note": "", "error": None,
        "bound_ms": None, **timed({}, None), "graph": None,
    }  # fmt: skip
    try:
        case = make()
        record |= {
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": case.shape,
            "note": case.note,
            "bound_ms": bound_ms(case.bytes, case.flops, case.dtype, ceiling, case.bandwidth),
        }
        wrong = case.check()
        if wrong is not None:
            return record | {"note": f"WRONG: {wrong}"}
        record["correct"] = True
        contenders = {"ours": case.ours, **case.peers}
        record |= section(contenders, device, seconds, record["bound_ms"])
        if (device == "cuda" or STANDIN) and case.captures:
            inside = contenders | {"ours": case.in_graph or case.ours}
            record["graph"] = graph_section(inside, device, seconds, record["bound_ms"])
    except Exception:
        record |= {"correct": False, "error": traceback.format_exc(limit=-4)}
    return record


def timed(timings: dict, bound: float | None, failed: dict | None = None) -> dict:
    """The fields of one way to call: medians of ours, of its forced backends and of the peers; None without ours."""
    times = {name: timing.ms for name, timing in timings.items()}
    ours = times.pop("ours", None)
    backends = {name: times.pop(f"ours on {name}") for name in BACKENDS if f"ours on {name}" in times}
    return {
        "ours_ms": ours,
        "backends": backends,
        "peers": times,
        "quartiles": {name: [timing.low, timing.high] for name, timing in timings.items()},
        "ratio": min(times.values()) / ours if ours and times else None,
        "fraction_of_bound": bound / ours if ours else None,
        "failed": failed or {},
    }


def section(contenders: dict[str, Callable], device: str, seconds: float, bound: float) -> dict:
    """Eager calls. A peer that raises is named with its error; ours raises."""
    working, failed = {}, {}
    for name, function in contenders.items():
        with noting(failed, name, device, let="ours"), torch.no_grad():
            function()
            synchronize(device)
            working[name] = function
    return timed(alternate(working, device, seconds), bound, failed)


def graph_section(contenders: dict[str, Callable], device: str, seconds: float, bound: float) -> dict:
    """The same calls inside graphs, and ours on each backend; whatever cannot be captured is named with its error."""
    calls, failed = {}, {}
    for name, function in contenders.items():
        with noting(failed, name, device):
            calls[name] = captured_under(None, function, device)
    for backend in BACKENDS:
        if flexkernels.available_backends()[backend] is None:
            with noting(failed, f"ours on {backend}", device):
                calls[f"ours on {backend}"] = captured_under(backend, contenders["ours"], device)
    if not calls:
        return timed({}, bound, failed)
    timings = {
        name: type(timing)(*(value / calls[name].count for value in timing))
        for name, timing in alternate(calls, device, seconds).items()
    }
    return timed(timings, bound, failed)


@torch.no_grad()
def captured_under(backend: str | None, function: Callable, device: str):
    if STANDIN and backend:
        # nothing holds a choice of backend but a capture
        plain = function
        function = lambda: call_under(backend, plain)  # noqa: E731
    with flexkernels.backend(backend or library.current_backend()):
        # what compiles at a first call must not be captured
        function()
        synchronize(device)
        return captured(function, device, lambda call: turn(call, 1, device))


def call_under(backend: str, function: Callable):
    with flexkernels.backend(backend):
        return function()


@contextlib.contextmanager
def noting(failed: dict, name: str, device: str, let: str | None = None) -> Iterator[None]:
    """Notes an error under `name`, unless it is that of `let`."""
    try:
        yield
    except Exception as error:
        if name == let:
            raise
        failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        with contextlib.suppress(Exception):
            # an error of the device, if it can be cleared, is this one's and not the next one's
            synchronize(device)


def device_lost(device: str) -> bool:
    """Whether the device does no more work in this process, after an illegal access for example."""
    if device != "cuda":
        return False
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize()
    except Exception:
        return True
    return False

"""Runs every contender of every case once, in parallel processes: what compiles fills the caches on disk."""

import multiprocessing
import time

import torch
from cases import CASES
from graphs import STANDIN
from measuring import BACKENDS

import flexkernels


def warm(names: list[str], device: str, processes: int, seconds: float | None = None) -> list[str]:
    """A line a contender that raised; cases that have not begun after so many seconds are left."""
    end = time.monotonic() + (seconds or float("inf"))
    # each process has a CUDA context of its own, which a forked one cannot have
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8) as pool:
        tasks = [pool.apply_async(run_once, (name, device, end)) for name in names]
        return [line for task in tasks for line in task.get()]


@torch.no_grad()
def run_once(name: str, device: str, end: float) -> list[str]:
    # CLOCK_MONOTONIC is the machine's, not the process's
    if time.monotonic() > end:
        return [f"{name}: no time to compile"]
    # the machine's cores are shared by all processes
    torch.set_num_threads(1)
    try:
        case = CASES[name](device)
    except Exception as error:
        return [f"{name}: {error!r}"[:300]]
    contenders, failed = {"ours": case.ours, **case.peers}, []
    forced = [backend for backend in BACKENDS if not STANDIN and flexkernels.available_backends()[backend] is None]
    for who, backend in [(who, "auto") for who in contenders] + [("ours", backend) for backend in forced]:
        try:
            with flexkernels.backend(backend):
                contenders[who]()
        except Exception as error:
            failed.append(f"{name}, {who} on {backend}: {error!r}"[:300])
    return failed

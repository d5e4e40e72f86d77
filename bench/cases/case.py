"""What a case is, and the helpers that cases share."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """One op at one size.

    ours and peers take nothing and compute the same thing. check says why our result is wrong, or None; nothing is
    timed against a wrong result. bytes and flops are the least that any implementation must move and compute; bandwidth
    is "copy", or "read" where next to nothing is written. captures: whether calls may be captured in a CUDA graph, as
    those cannot that make graphs of their own; in_graph: what is captured in place of ours, where that makes one.
    """

    dtype: torch.dtype
    shape: list[int]
    ours: Callable
    peers: dict[str, Callable]
    check: Callable[[], str | None]
    bytes: int
    flops: int = 0
    note: str = ""
    bandwidth: str = "copy"
    captures: bool = True
    in_graph: Callable | None = None
    name: str = field(default="", init=False)


CASES: dict[str, Callable[[str], Case]] = {}
# cases too large for a CPU
GPU_ONLY: set[str] = set()


def case(name: str, gpu_only: bool = False):
    def add(make):
        def named(device: str) -> Case:
            torch.manual_seed(0)
            result = make(device)
            result.name = name
            return result

        CASES[name] = named
        if gpu_only:
            GPU_ONLY.add(name)
        return named

    return add


def size(*tensors: torch.Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled(function, device: str) -> dict[str, Callable]:
    """The peer `torch.compile`, where its compiler can run."""
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return {}
    return {"torch.compile": torch.compile(function, fullgraph=True)}


def accurate(result, plain, exact) -> str | None:
    """Why `result` is further from `exact` (float64) than twice the eager formula `plain` is, or None."""
    error, allowed = ((value.double() - exact).abs().max() for value in (result, plain))
    rounding = torch.finfo(result.dtype).eps / 2 * exact.abs().max()
    budget = 2 * torch.maximum(allowed, rounding)
    return None if bool(error <= budget) else f"error {error:.2e} over {budget:.2e}"

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
    is "copy", or "read" where next to nothing is written.
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
    name: str = field(default="", init=False)


CASES: dict[str, Callable[[str], Case]] = {}


def case(name: str):
    def add(make):
        def named(device: str) -> Case:
            torch.manual_seed(0)
            result = make(device)
            result.name = name
            return result

        CASES[name] = named
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

"""What several test files share: which backends to run on which device, and the one measure of accuracy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexkernels
from flexkernels import _native, library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")


def _places():
    for name, device in (("reference", DEVICE), ("cpu", "cpu"), ("triton", DEVICE), ("cuda", "cuda")):
        reason = flexkernels.available_backends()[name]
        skip = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        yield pytest.param((name, device), marks=skip, id=f"{name}-{device}")
    # the CUDA kernels on CPU tensors
    yield pytest.param(("cuda", "cpu"), marks=pytest.mark.emulator, id="cuda-emulated")


# the compiler of torch.compile, which calls one for C++
inductor = pytest.param(
    "inductor", marks=pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
)

# (backend, device) of every backend; one that cannot run here is a visible skip
on_every_backend = pytest.mark.parametrize("place", list(_places()))
# the CUDA kernels alone, on a GPU and in the emulator
on_cuda = pytest.mark.parametrize("place", [p for p in _places() if p.id.startswith("cuda-")])
# without the emulator, for what would take it minutes
on_every_machine = pytest.mark.parametrize("place", [p for p in _places() if p.id != "cuda-emulated"])


def emulated(place) -> bool:
    """Whether the kernels of this place run in the CUDA emulator: a memory access costs 20 ns or more."""
    return place == ("cuda", "cpu")


def interpreted(place) -> bool:
    """Whether the kernels of this place run in Triton's interpreter, which is slow and cuts bfloat16 off unrounded."""
    return place[0] == "triton" and library.interpreting()


def called_ops(monkeypatch) -> list[str]:
    """A list that gets the name of every op from now on, as it is called."""
    calls, call = [], library.Op.__call__
    monkeypatch.setattr(library.Op, "__call__", lambda op, *args: (calls.append(op.name), call(op, *args))[1])
    return calls


def assert_accurate(result: torch.Tensor, formula: torch.Tensor, exact: torch.Tensor, terms: float = 0.0):
    """`result` is at most twice as far from `exact` (float64) as `formula`, plain PyTorch in the same dtype, is.

    Where that formula happens to be nearly exact, half a unit in the last place of the largest value counts as its
    error: storing the result costs that much. terms: the size of what cancels to the result, where all of it may.
    """
    assert result.dtype == formula.dtype and result.shape == exact.shape
    assert exact.dtype == torch.float64 and torch.isfinite(exact).all()
    if exact.numel() == 0:
        return
    exact = exact.cpu()
    error, allowed = ((value.cpu().double() - exact).abs().max() for value in (result, formula))
    rounding = torch.finfo(result.dtype).eps / 2 * exact.abs().max().clamp(min=terms)
    budget = 2 * max(allowed, rounding)
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}"


def repeat_at_level(file: str, keyword: str, level: str) -> None:
    """The tests of a file that match `keyword`, in a process whose CPU kernels are held to an ISA level."""
    levels = ("baseline", "avx2", "avx512", "avx512_bf16")
    if _native.C is None or levels.index(level) >= levels.index(_native.C.cpu_capability()):
        pytest.skip(f"{level} is not below this process's own level")
    environment = dict(os.environ, FLEXKERNELS_CPU_CAPABILITY=level, PYTHONPATH=str(Path(_native.__file__).parents[1]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", keyword, file]
    # from another folder than the repository's, so that the package with the built kernels is meant
    done = subprocess.run(command, env=environment, cwd=Path(file).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "." in done.stdout.split("[")[0], done.stdout + done.stderr

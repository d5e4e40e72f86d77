"""Loads the compiled objects. Importing this module never fails: a reason string says why one is missing.

`C` is the pybind11 module flexkernels._C, or None; `cpu_unavailable` and `cuda_unavailable` are None where the backend
can be used.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

_CUDA_OBJECT = Path(__file__).with_name("flexkernels_cuda.so")


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    try:
        from flexkernels import _C
    except ImportError as error:
        if not list(Path(__file__).parent.glob("_C.*.so")):
            return None, "the C++ kernels were not built (install with a C++ compiler, or build_ext --inplace)"
        return None, f"the C++ kernels do not load: {error}"
    try:
        _C.cpu_capability()
    except ValueError as error:
        return _C, str(error)
    return _C, None


def _load_cuda() -> str | None:
    if C is None:
        return cpu_unavailable
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if not _CUDA_OBJECT.is_file():
        return "the CUDA kernels were not built (install with nvcc)"
    try:
        torch.ops.load_library(str(_CUDA_OBJECT))
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    return None


C, cpu_unavailable = _load_cpu()
cuda_unavailable = _load_cuda()

"""Loads the compiled objects. Importing this module never fails: a reason string says why one is missing.

`C` is the module flexkernels._C, or None; `plan` is its planner on NumPy arrays; `cpu_unavailable` and
`cuda_unavailable` are None where the backend can be used.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

_CUDA_OBJECT = Path(__file__).with_name("flexkernels_cuda.so")


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C
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


def plan(
    queries: tuple[np.ndarray, ...], keys: tuple[np.ndarray, ...], mask: int, cross: np.ndarray, rows: int, step: int
) -> tuple[np.ndarray, ...]:
    """What attention under a packed layout visits: the arrays of :class:`flexkernels.layout.TilePlan`.

    queries, keys: (frame_offsets int32 [B + 1], prefix_len int32 [F], suffix_len int32 [F]); cross: int32 [4]; mask: 0
    full, 1 causal, 2 frame_causal, 3 frame_causal_prefix; rows: of a tile of queries; step: keys of a tile, of which
    full runs are multiples. ValueError for input out of range, TypeError for other arrays.
    """
    assert C is not None
    given = tuple(map(_bytes, queries)), tuple(map(_bytes, keys))
    made = [np.frombuffer(part, np.int32) for part in C.plan(*given, mask, _bytes(cross), rows, step)]
    widths = (None, rows, 8, None, 3, 8, None, 3)
    return tuple(x if n is None else x.reshape(-1, n) for x, n in zip(made, widths, strict=True))


def _bytes(array: np.ndarray) -> bytes:
    if array.dtype != np.int32:
        raise TypeError(f"lengths and cross must be int32, got {array.dtype}")
    return array.tobytes()


C, cpu_unavailable = _load_cpu()
cuda_unavailable = _load_cuda()

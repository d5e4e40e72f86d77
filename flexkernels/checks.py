"""Input validation, one wording: "<argument> must ..., got ..."; everything here runs before any launch."""

from __future__ import annotations

import numbers
import os
from collections.abc import Collection, Iterable, Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def reject(name: str, must: str, got, error: type = ValueError):
    """Raises `error` in the one wording of this package."""
    raise error(f"{name} must {must}, got {got}")


def tensor(name: str, value, dtypes: Collection[torch.dtype] | None = None, ndim: int | None = None):
    """A torch.Tensor of one of `dtypes` with `ndim` dimensions, or TypeError / ValueError."""
    if not isinstance(value, torch.Tensor):
        reject(name, "be a torch.Tensor", type(value).__name__, TypeError)
    if dtypes is not None and value.dtype not in dtypes:
        reject(name, f"be {one_of(dtypes)}", short(value.dtype), TypeError)
    if ndim is not None and value.dim() != ndim:
        reject(name, f"have {ndim} dimensions", f"shape {list(value.shape)}")


def like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor):
    """`value` has the shape and lives on the device of `other`."""
    shape(name, value, other.shape, f" of {other_name}")
    same_device(name, value, other_name, other)


def shape(name: str, value: torch.Tensor, expected: Sequence[int], whose: str = ""):
    if value.shape != tuple(expected):
        reject(name, f"have the shape {list(expected)}{whose}", list(value.shape))


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor):
    if value.device != other.device:
        reject(name, f"be on {other.device} like {other_name}", value.device)


def finite(name: str, value) -> float:
    """A finite Python number (or the symbolic one of torch.compile), as a float."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real, torch.SymInt, torch.SymFloat)):
        reject(name, "be a number", type(value).__name__, TypeError)
    # inf - inf and nan - nan are nan; math.isfinite cannot be traced with a symbolic number
    if value - value != 0:
        reject(name, "be finite", value)
    return float(value)


def at_least(name: str, value, low) -> float:
    value = finite(name, value)
    if value < low:
        reject(name, f"be at least {low}", value)
    return value


def integers(name: str, values: Iterable, low: int, high: int) -> tuple[int, ...]:
    """A non-empty sequence of ints in [low, high], as a tuple."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        reject(name, "be a list or tuple of ints", type(values).__name__, TypeError)
    if len(values) == 0:
        reject(name, "not be empty", list(values))
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            reject(name, "hold ints alone", repr(value), TypeError)
        if not low <= value <= high:
            reject(name, f"lie between {low} and {high}", value)
    return tuple(values)


def offsets(name: str, value: torch.Tensor, total: int):
    """`value` rises from 0 to `total`. Looks at the values: for CPU tensors, inside an op, never while tracing."""
    if value.device.type != "cpu":
        return
    if value[0] != 0 or value[-1] != total:
        reject(name, f"run from 0 to {total}", f"{int(value[0])} to {int(value[-1])}")
    if bool((value[1:] < value[:-1]).any()):
        reject(name, "never fall", value.tolist())


def in_range(name: str, values: torch.Tensor, low: int, high: int):
    """Integers in [low, high]. Looks at the values: for CPU tensors, and never while tracing."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # a list is the quickest way for the few numbers of a decoding step
    numbers = values.tolist() if values.numel() <= 64 else [int(end) for end in torch.aminmax(values)]
    for number in numbers:
        if not low <= number <= high:
            reject(name, f"lie between {low} and {high}", number)


def all_finite(name: str, values: torch.Tensor):
    """Looks at the values as `in_range` does."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not values.isfinite().all():
        reject(name, "be finite", "NaN or infinity")


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Whether to look at numbers inside `tensor`: on the CPU; elsewhere, where it waits, under FLEXKERNELS_CHECK=1."""
    return tensor.device.type == "cpu" or os.environ.get("FLEXKERNELS_CHECK", "0") not in ("", "0")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def one_of(dtypes: Collection[torch.dtype]) -> str:
    return " or ".join(short(dtype) for dtype in dtypes)

"""Where ops are defined, and the one table that says which backend serves which op on which device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from . import _native

NAMESPACE = "flexkernels"
BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "FLEXKERNELS_BACKEND"

# what `auto` tries, best first; a device type that is not named here gets the reference
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_forced: ContextVar[str | None] = ContextVar("flexkernels_backend", default=None)


@dataclass(frozen=True)
class Row:
    """One backend's way to run one op: `launch(*args)` fills preallocated outputs."""

    launch: Callable
    unsupported: Callable | None


_table: dict[str, dict[str, Row]] = {}


def define(name: str, schema: str, impl: Callable, fake: Callable):
    """Defines `torch.ops.flexkernels.<name>` with `schema` ("(Tensor x) -> Tensor") and returns its overload.

    `impl` allocates the outputs and calls `launch`; `fake` gives their shapes and dtypes alone.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the op `name` its gradient: `backward(ctx, *grads)` in plain PyTorch, so that it can be traced."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def register(op: str, backend: str, launch: Callable, unsupported: Callable | None = None) -> None:
    """Adds the row (op, backend). `unsupported(*args)` says why a call cannot be served, or None when it can."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _table.setdefault(op, {})[backend] = Row(launch, unsupported)


def launch(op: str, *args) -> None:
    """Runs `op` on the chosen backend; the device is that of the first tensor among `args`."""
    _choose(op, args).launch(*args)


def current_backend() -> str:
    """The backend in force: the innermost `with backend(...)`, else FLEXKERNELS_BACKEND, else "auto"."""
    name = _forced.get() or os.environ.get(ENVIRONMENT) or "auto"
    return _known(name)


@contextlib.contextmanager
def backend(name: str):
    """Forces one backend ("reference", "cpu", "triton", "cuda") or "auto" inside the `with` block.

    A forced backend that cannot serve a call raises RuntimeError saying why; nothing falls back silently.
    Raises ValueError for any other name.
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None when it can run on this machine and otherwise the reason why it cannot."""
    return {name: _unavailable(name) for name in BACKENDS}


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (on CPU tensors, slowly: for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _known(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def _choose(op: str, args) -> Row:
    for first in args:
        if isinstance(first, torch.Tensor):
            break
    device, forced = first.device, current_backend()
    kind = device.type
    names = _ORDER.get(kind, ("reference",)) if forced == "auto" else (forced,)
    # most calls: the best backend is at home on this device and its row takes everything
    row = _table[op].get(names[0])
    if row is not None and row.unsupported is None and names[0] == kind and _unavailable(kind) is None:
        return row
    reasons = []
    for name in names:
        reason = _refusal(op, name, device, args)
        if reason is None:
            return _table[op][name]
        reasons.append(f"{name}: {reason}")
    asked = "no backend can" if forced == "auto" else f"the forced backend {forced!r} cannot"
    raise RuntimeError(f"flexkernels.{op}: {asked} serve this call on {device} ({'; '.join(reasons)})")


def _refusal(op: str, name: str, device: torch.device, args) -> str | None:
    """Why backend `name` cannot run `op` on `args`, or None."""
    row = _table[op].get(name)
    if row is None:
        return f"it has no {op}"
    reason = _unavailable(name) or _wrong_device(name, device)
    if reason is None and row.unsupported is not None:
        reason = row.unsupported(*args)
    return reason


def _wrong_device(name: str, device: torch.device) -> str | None:
    if name == "reference" or name == device.type or (name == "triton" and device.type == "cuda"):
        return None
    if name == "triton" and device.type == "cpu":
        return None if interpreting() else "it runs on CPU tensors only under TRITON_INTERPRET=1"
    return f"it does not run on {device.type} tensors"


def _unavailable(name: str) -> str | None:
    if name == "triton":
        return _triton_missing() or _triton_idle()
    if name == "cpu":
        return _native.cpu_unavailable
    return _native.cuda_unavailable if name == "cuda" else None


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _triton_idle() -> str | None:
    if interpreting() or torch.cuda.is_available():
        return None
    return "no GPU is available (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"

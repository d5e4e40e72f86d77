"""Ops not yet on library.Op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .library import BACKENDS, NAMESPACE, _unavailable, _wrong_device, current_backend
from .library import _library as _libraries

_library = _libraries[NAMESPACE]
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


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

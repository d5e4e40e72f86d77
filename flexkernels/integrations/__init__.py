"""Drop-in acceleration of other codebases: ``accelerate(model)`` changes one in place, ``restore(model)`` undoes it.

One module for each codebase. It recognises that codebase's classes by their names and imports nothing of it, so that an
absent package costs nothing. Some lie here; other packages announce theirs by entry points, which are loaded when a
model is met that nothing here knows.
"""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger("flexkernels")

# an integration is a module with knows(model) and accelerate(model, **options) -> Change; those of this package are
# asked first (`torchdiffeq` and `transformers` have functions to call instead), then this group of entry points
OWN = ("vector_quantize_pytorch", "diffusers")
GROUP = "flexkernels.integrations"

_undo: weakref.WeakKeyDictionary[Any, list[Callable[[], None]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Change:
    """What an integration did to one object: the parts it replaced, the parts it left, and how to undo it."""

    replaced: list[str]
    left: list[str]
    undo: Callable[[], None]


def accelerate(model: Any, **options: Any) -> Any:
    """Makes a model (or scheduler, or quantizer) of another codebase run on these kernels, in place; returns it.

    ``model`` is an object that an integration knows, or an ``nn.Module`` that contains such modules. ``options`` go to
    the integration; see docs/integrations.md. What was replaced and what was left is logged at level INFO by the logger
    "flexkernels". An accelerated model is left as it is.

    Raises TypeError when nothing in the model is known, or an integration does not know an option.
    """
    if model in _undo:
        return model
    integrations = _integrations()
    found = list(_known(model, integrations))
    if not found:
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        names = ", ".join(integration.name for integration in integrations)
        raise TypeError(f"model must hold something of {names}; found nothing known in {name}")
    for _, _, integration in found:
        _check_options(integration, options)
    undo: list[Callable[[], None]] = []
    try:
        for path, part, integration in found:
            change = integration.accelerate(part, **options)
            undo.append(change.undo)
            replaced, left = (", ".join(parts) or "nothing" for parts in (change.replaced, change.left))
            logger.info("%s: replaced %s; left %s", path or type(part).__name__, replaced, left)
    except BaseException:
        _run(undo)
        raise
    _undo[model] = undo
    return model


def restore(model: Any) -> Any:
    """Undoes :func:`accelerate`; returns the model. Raises ValueError when the model is not accelerated."""
    if model not in _undo:
        raise ValueError(f"model must have been given to accelerate before, got an unchanged {type(model).__name__}")
    _run(_undo.pop(model))
    return model


def is_a(model: Any, *names: str) -> bool:
    """Whether a class of the model, its bases included, has one of the full names (module.Class) given."""
    return any(f"{base.__module__}.{base.__qualname__}" in names for base in type(model).__mro__)


def _integrations() -> list[EntryPoint]:
    """Where the integrations lie, not yet imported: this package's, then those that are announced."""
    announced = {point.name: point for point in (*entry_points(group=GROUP), *_of_source_tree())}
    return [*(EntryPoint(name, f"{__name__}.{name}", GROUP) for name in OWN), *announced.values()]


def _of_source_tree() -> list[EntryPoint]:
    """What the pyproject.toml beside this package announces: a source tree that is not installed has no metadata."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return []
    _, _, rest = project.read_text(encoding="utf-8").partition(f'[project.entry-points."{GROUP}"]\n')
    section, _, _ = rest.partition("\n[")
    return [EntryPoint(*pair, GROUP) for pair in re.findall(r'^(\w+) = "([\w.]+)"$', section, re.MULTILINE)]


def _known(model: Any, integrations: Sequence[EntryPoint], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    # the outermost objects that an integration knows: (name inside the model, object, integration)
    for point in integrations:
        integration = point.load()
        if integration.knows(model):
            yield path, model, integration
            return
    if isinstance(model, nn.Module):
        for name, child in model.named_children():
            yield from _known(child, integrations, f"{path}.{name}" if path else name)


def _check_options(integration: Any, options: dict[str, Any]) -> None:
    parameters = list(inspect.signature(integration.accelerate).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for name in options:
        if name not in known:
            codebase = integration.__name__.rpartition(".")[2]
            raise TypeError(f"options of {codebase} must be among {', '.join(known) or 'none'}, got {name}")


def _run(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()

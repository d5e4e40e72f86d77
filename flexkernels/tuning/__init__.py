"""Tile sizes as they were measured: one table for each GPU architecture, read once.

A table is a JSON object {arch, device, date, source, entries}; entries has a list for each kernel, and the first
element whose "if" holds is used. In an "if", min_<fact> and max_<fact> compare, a list holds what is allowed, anything
else must be equal. The last "if" of a list is empty.
"""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path

import torch

DEFAULT = "sm_90"
KEYS = {"arch", "device", "date", "source", "entries"}


def read(path: Path) -> dict:
    """A table. Raises ValueError for one of another form."""
    table = json.loads(path.read_text())
    _check(isinstance(table, dict) and set(table) == KEYS, path, f"have the keys {', '.join(sorted(KEYS))}")
    _check(table["arch"] == path.stem, path, "be named after its arch")
    _check(all(isinstance(table[name], str) and table[name] for name in KEYS - {"entries"}), path, "say what it is of")
    datetime.date.fromisoformat(table["date"])
    for kernel, entries in table["entries"].items():
        formed = all(set(entry) == {"if", "use"} for entry in entries)
        _check(formed and entries and entries[-1]["if"] == {}, path, f'end {kernel} with an "if" that always holds')
    return table


def _check(ok: bool, path: Path, must: str) -> None:
    if not ok:
        raise ValueError(f"{path.name} must {must}")


TABLES = {path.stem: read(path) for path in Path(__file__).parent.glob("*.json")}


def choose(kernel: str, **facts) -> dict:
    """What to use for `kernel` on the current GPU; of architectures that were not measured, as on the default one."""
    return _choose(_arch(), kernel, tuple(facts.items()))


@functools.cache
def _choose(arch: str, kernel: str, facts: tuple) -> dict:
    entries = TABLES[arch if arch in TABLES else DEFAULT]["entries"][kernel]
    return next(entry["use"] for entry in entries if all(_holds(*c, dict(facts)) for c in entry["if"].items()))


def _holds(name: str, wanted, facts: dict) -> bool:
    if name.startswith("min_"):
        return facts[name[4:]] >= wanted
    if name.startswith("max_"):
        return facts[name[4:]] <= wanted
    return facts[name] in wanted if isinstance(wanted, list) else facts[name] == wanted


def _arch() -> str:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return DEFAULT
    return "sm_{}{}".format(*torch.cuda.get_device_capability())

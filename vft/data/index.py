"""The index of a shard: ``shard-x.tar.index.json`` beside ``shard-x.tar``, written after it.

    {"version": 1, "shard": "shard-x.tar", "bytes": size of the shard, "facts": what all rows share (see FACTS),
     "key": [...], "latent_frames": [...], "checksum": [...],          one entry a row
     "ranges": [[offset, size of .vft, offset, size of .json], ...],    tar: of each row
     "groups": [rows of each row group], "columns": {name: [[offset, size] in each row group]},   Parquet
     "errors": [{"key": ..., "error": ...}]}                            rows that could not be encoded

An index whose ``shard`` is null has errors alone. Where a folder has an index, shards without one are unfinished.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import replacing

SUFFIX = ".index.json"
VERSION = 1
# the same in all rows of a shard
FACTS = ("model", "fingerprint", "levels", "chunk", "registers")


@dataclass
class Index:
    """See the file's format above; ``facts`` are {} where there is no row."""

    shard: str | None
    bytes: int
    facts: dict[str, Any]
    key: list[str] = field(default_factory=list)
    latent_frames: list[int] = field(default_factory=list)
    checksum: list[str] = field(default_factory=list)
    ranges: list[list[int]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    columns: dict[str, list[list[int]]] = field(default_factory=dict)
    errors: list[dict[str, str]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes the index file, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":")) + "\n")


def load_index(path: Path) -> Index:
    """Reads an index file. Raises ValueError for a damaged one, OSError where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("version") != VERSION:
            raise ValueError(f"version must be {VERSION}")
        index = Index(**content)
        if index.shard is not None and not set(FACTS) <= index.facts.keys():
            raise ValueError(f"facts must have {', '.join(FACTS)}")
        if not len(index.key) == len(index.latent_frames) == len(index.checksum):
            raise ValueError("key, latent_frames and checksum must have an entry for each row")
        return index
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of a shard, or a damaged one ({error})") from error


def check_whole(path: Path, index: Index) -> None:
    """Raises ValueError where a shard has not the size that its index states, OSError where it is gone."""
    size = path.stat().st_size
    if size != index.bytes:
        raise ValueError(f"{path}: the shard must have {index.bytes} bytes as its index says, got {size}")


def shared_facts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all rows of a shard share. Raises ValueError for a row with an error, and where rows differ."""
    for row in rows:
        if row.get("error") is not None:
            raise ValueError(f"rows must be free of errors, got {row['key']!r}: {row['error']}")
    found = [
        {
            "model": row["model"], "fingerprint": row["fingerprint"], "levels": [int(level) for level in row["levels"]],
            "chunk": int(row["chunk"]), "registers": int(row["ids"].shape[1]),
        }
        for row in rows
    ]  # fmt: skip
    for row, facts in zip(rows, found, strict=True):
        if facts != found[0]:
            raise ValueError(f"rows of a shard must share {', '.join(FACTS)}, got {facts} of {row['key']!r}")
    return found[0] if found else {}

"""Shards of any kind: where they lie, how one is written, how one is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .index import SUFFIX, Index, load_index
from .parquet import ParquetShard, write_parquet
from .rows import Row
from .tar import TarShard, write_tar

KINDS = ("tar", "parquet")
_WRITERS: dict[str, Callable[[Path, Sequence[Row]], Index]] = {"tar": write_tar, "parquet": write_parquet}


def write_shard(path: str | os.PathLike, rows: Iterable[Row]) -> Index:
    """Writes rows as :class:`vft.data.Encoder` makes them into a ``.tar`` or ``.parquet`` shard, then its index.

    Rows with an error go into the index alone; without any other row, no shard is written. Both files appear whole or
    not at all, the index last.

    Raises:
        ValueError: another suffix, or rows of different models or numbers of registers.
        OSError: a file cannot be written. ImportError: Parquet without pyarrow.
    """
    path, rows = Path(path), list(rows)
    kind = path.suffix.removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"path must end in .{' or .'.join(KINDS)}, got {str(path)!r}")
    good = [row for row in rows if row.get("error") is None]
    index = _WRITERS[kind](path, good) if good else Index(None, 0, {})
    index.errors = [{"key": row["key"], "error": row["error"]} for row in rows if row.get("error") is not None]
    index.save(path.with_name(path.name + SUFFIX))
    return index


def open_shard(path: str | os.PathLike) -> TarShard | ParquetShard:
    """Opens a shard, with its index where there is one.

    Raises:
        ValueError: another suffix; a shard that is cut off, damaged, or not one of tokens.
        OSError: it cannot be read. ImportError: Parquet without pyarrow.
    """
    path = Path(path)
    beside = path.with_name(path.name + SUFFIX)
    index = load_index(beside) if beside.exists() else None
    if path.suffix == ".parquet":
        return ParquetShard(path, index)
    if path.suffix == ".tar":
        return TarShard(path, index)
    raise ValueError(f"shard must end in .{' or .'.join(KINDS)}, got {str(path)!r}")


def find_shards(folder: str | os.PathLike) -> list[Path]:
    """The shards below a folder, sorted; in a folder with an index, those that have one: others are unfinished."""
    found = sorted(p for kind in KINDS for p in Path(folder).rglob(f"*.{kind}") if not p.name.startswith("."))
    finished = {p.with_name(p.name.removesuffix(SUFFIX)) for p in Path(folder).rglob(f"*{SUFFIX}")}
    folders = {p.parent for p in finished}
    return [p for p in found if p.parent not in folders or p in finished]

"""Tar shards as webdataset reads them: ``00000000.json``, a row without its ids, and ``00000000.vft``, row by row."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from ..tokens import VideoTokens
from .index import Index, check_whole, shared_facts
from .rows import Row, row_of, tokens_of

# rows read together
BLOCK = 1024
_NOT_STORED = ("ids", "error", "levels", "path")
# of a .json that describes its row whole; that of somebody else may have any column
_OURS = {"key", "frames", "fps", "height", "width", "model", "fingerprint", "chunk", "checksum"}


def write_tar(path: Path, rows: Sequence[Row]) -> Index:
    """Writes a shard, whole or not at all; returns its index, not yet saved.

    Columns beyond those of :mod:`vft.data.rows` must be JSON values. Raises ValueError for rows that do not belong in
    one shard (see :func:`shared_facts`), OSError where it cannot be written.
    """
    facts = shared_facts(list(rows))
    index = Index(path.name, 0, facts)
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, row in enumerate(rows):
                data = tokens_of(row).to_bytes()
                about = {name: _plain(value) for name, value in row.items() if name not in _NOT_STORED}
                described = _add(tar, f"{i:08d}.json", json.dumps(about).encode())
                index.ranges.append([*_add(tar, f"{i:08d}.vft", data), *described])
                index.key.append(row["key"])
                index.latent_frames.append(len(row["ids"]))
                index.checksum.append(hashlib.sha256(data).hexdigest())
        index.bytes = temporary.stat().st_size
    return index


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """(offset, size) of the data, which a header of one block precedes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start, len(data)


class TarShard:
    """The rows of a tar: ours, or another whose members are ``NAME.vft`` and perhaps ``NAME.json`` with more columns.

    Raises ValueError naming the file where it is cut off, no tar, or has no .vft in it.
    """

    def __init__(self, path: Path, index: Index | None) -> None:
        self.path = path
        if index is not None:
            check_whole(path, index)
            self._ranges, self._names = index.ranges, index.key
        else:
            self._ranges, self._names = _members(path)
        self.blocks = [min(BLOCK, len(self._ranges) - i) for i in range(0, len(self._ranges), BLOCK)]
        self.index = index or self._scan()
        self.facts = self.index.facts

    def _scan(self) -> Index:
        rows = [row for block in range(len(self.blocks)) for row in self.read(block, None)]
        least = min(row["ids"].shape[1] for row in rows)
        facts = shared_facts([row | {"ids": row["ids"][:, :least]} for row in rows])
        lengths = [len(row["ids"]) for row in rows]
        return Index(self.path.name, self.path.stat().st_size, facts, [row["key"] for row in rows], lengths)

    def keys(self) -> list[str]:
        return self.index.key

    def latent_frames(self) -> list[int]:
        return self.index.latent_frames

    def read(self, block: int, keep: int | None) -> list[Row]:
        """The rows of one block, their first ``keep`` registers, by one read of the range of bytes they lie in.

        Raises ValueError naming the file where a row is damaged.
        """
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        ranges = self._ranges[part]
        start = min(min(r[0], r[2] or r[0]) for r in ranges)
        end = max(max(r[0] + r[1], r[2] + r[3]) for r in ranges)
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        return [
            self._row(data[a - start : a - start + n], data[b - start : b - start + m] if m else None, name, keep)
            for (a, n, b, m), name in zip(ranges, self._names[part], strict=True)
        ]

    def _row(self, content: bytes, described: bytes | None, name: str, keep: int | None) -> Row:
        where = f"{self.path}: {name}"
        tokens = VideoTokens.from_bytes(content, where)
        try:
            facts = json.loads(described or b"{}")
            row = {} if facts.keys() >= _OURS else row_of(tokens, name)
            return row | {"levels": np.array(tokens.levels), "error": None} | facts | {"ids": _ids(tokens, keep)}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: its .json must be a mapping of columns ({error})") from error


def _ids(tokens: VideoTokens, keep: int | None) -> np.ndarray:
    return tokens.ids[:, :keep].numpy().astype(np.uint16)


def _members(path: Path) -> tuple[list[list[int]], list[str]]:
    """Ranges as in an index and a name of each row of a tar."""
    found: dict[str, dict[str, list[int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _, suffix = member.name.rpartition(".")
                if member.isfile() and suffix in ("vft", "json"):
                    found.setdefault(name, {})[suffix] = [member.offset_data, member.size]
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar, or one that is cut off ({error})") from error
    with open(path, "rb") as file:
        # a whole tar ends in two blocks of zeros
        file.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
        if any(file.read()):
            raise ValueError(f"{path}: the tar is cut off")
    rows = {name: [*r["vft"], *r.get("json", [0, 0])] for name, r in found.items() if "vft" in r}
    if not rows:
        raise ValueError(f"{path}: no .vft file in it")
    return list(rows.values()), list(rows)

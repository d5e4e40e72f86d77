"""Parquet shards: the registers of each level in a column of their own, so that the first k are read alone.

Columns ``ids_0_1``, ``ids_1_2``, ``ids_2_4``, ``ids_4_8``, ...: list<uint16>, registers [a, b) of every latent frame,
frame after frame. ``key``, ``frames``, ``fps``, ``height``, ``width``, ``checksum`` (32 bytes), and other columns as
given; what all rows share is JSON in the schema's metadata under ``vft``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..deferred import Deferred
from ..files import replacing
from .index import FACTS, Index, check_whole, shared_facts
from .rows import Row

pa = Deferred("pyarrow", "a Parquet shard", "pyarrow")
pq = Deferred("pyarrow.parquet", "a Parquet shard", "pyarrow")

# rows of a row group, which are read together
GROUP = 4096
_FIXED = ("key", "frames", "fps", "height", "width", "checksum")
_NOT_STORED = (*_FIXED, *FACTS, "ids", "error", "path")
_METADATA = b"vft"
# at both ends of a Parquet file
_MAGIC = b"PAR1"


def levels_of(registers: int) -> list[tuple[int, int]]:
    """The ranges [a, b) of registers that lie in one column each: 0, 1, 2-3, 4-7, ..."""
    edges = [0, *(1 << i for i in range(registers.bit_length()) if 1 << i < registers), registers]
    return list(pairwise(edges))


def write_parquet(path: Path, rows: Sequence[Row]) -> Index:
    """Writes a shard, whole or not at all; returns its index, not yet saved.

    Raises ValueError for no rows or ones that do not belong in one shard (see :func:`shared_facts`), ImportError
    without pyarrow, OSError where it cannot be written.
    """
    rows = list(rows)
    facts = shared_facts(rows)
    if not rows:
        raise ValueError("rows must not be empty")
    columns = {
        "key": pa.array([row["key"] for row in rows], pa.string()),
        **{name: pa.array([row[name] for row in rows], pa.int32()) for name in ("frames", "height", "width")},
        "fps": pa.array([row["fps"] for row in rows], pa.float64()),
        "checksum": pa.array([bytes.fromhex(row["checksum"]) for row in rows], pa.binary(32)),
    }
    lengths = np.array([len(row["ids"]) for row in rows])
    for a, b in levels_of(facts["registers"]):
        values = np.concatenate([row["ids"][:, a:b].reshape(-1) for row in rows])
        offsets = np.concatenate([[0], np.cumsum(lengths * (b - a))]).astype(np.int32)
        columns[_name(a, b)] = pa.ListArray.from_arrays(offsets, pa.array(values, pa.uint16()))
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in _NOT_STORED:
            columns[name] = pa.array([row.get(name) for row in rows])
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(facts).encode()})
    # 16-bit ids are stored in 32 bits, whose upper bytes are all zero: apart from the others they cost nothing
    ids = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in columns if name.startswith("ids_")}
    with replacing(path) as temporary:
        pq.write_table(
            table, temporary, row_group_size=GROUP, compression="zstd", write_statistics=False,
            write_page_checksum=True,
            use_dictionary=["frames", "fps", "height", "width"], column_encoding={"key": "DELTA_BYTE_ARRAY", **ids},
        )  # fmt: skip
        size, metadata = temporary.stat().st_size, pq.read_metadata(temporary)
    checksums = [row["checksum"] for row in rows]
    return Index(
        path.name, size, facts, [row["key"] for row in rows], lengths.tolist(), checksums,
        groups=[metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], columns=_ranges(metadata),
    )  # fmt: skip


def _name(a: int, b: int) -> str:
    return f"ids_{a}_{b}"


def _ranges(metadata) -> dict[str, list[list[int]]]:
    """[offset, size] of each column in each row group."""
    found: dict[str, list[list[int]]] = {}
    for i in range(metadata.num_row_groups):
        for j in range(metadata.num_columns):
            chunk = metadata.row_group(i).column(j)
            start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            name = chunk.path_in_schema.removesuffix(".list.element")
            found.setdefault(name, []).append([start, chunk.total_compressed_size])
    return found


class ParquetShard:
    """The rows of a Parquet file that :func:`write_parquet` wrote, with its index or without.

    Raises ValueError naming the file where it is cut off or was written by something else, ImportError without pyarrow.
    """

    def __init__(self, path: Path, index: Index | None) -> None:
        self.path = path
        if index is not None:
            check_whole(path, index)
        # read once, and given to every reader of the file
        self.metadata = self._footer()
        with self._open() as file:
            facts = (file.schema_arrow.metadata or {}).get(_METADATA)
            if facts is None:
                raise ValueError(f"{path}: not a shard of tokens (its schema has no metadata 'vft')")
            self.facts = json.loads(facts)
            self.blocks = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            self.names = file.schema_arrow.names
            self.index = index or self._scan(file)

    def keys(self) -> list[str]:
        return self.index.key

    def latent_frames(self) -> list[int]:
        return self.index.latent_frames

    def _footer(self):
        """The metadata, by a read of its own bytes: pyarrow takes the last 64 KiB of a file, much of a small shard."""
        with open(self.path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 8, 0))
            tail = file.read(8)
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != _MAGIC or length + 12 > size:
                raise ValueError(f"{self.path}: not a Parquet file, or one that is cut off (its end is not a footer)")
            file.seek(size - 8 - length)
            footer = file.read(length)
        try:
            # a file of no data but this footer
            return pq.read_metadata(pa.BufferReader(_MAGIC + footer + tail))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: not a Parquet file, or one that is damaged ({error})") from error

    def _open(self, source=None):
        return pq.ParquetFile(source or self.path, metadata=self.metadata, page_checksum_verification=True)

    def _scan(self, file) -> Index:
        first = _name(*levels_of(self.facts["registers"])[0])
        table = file.read(["key", first])
        width = levels_of(self.facts["registers"])[0][1]
        lengths = [len(ids) // width for ids in table[first]]
        return Index(self.path.name, self.path.stat().st_size, self.facts, table["key"].to_pylist(), lengths)

    def read(self, block: int, keep: int | None, source=None) -> list[Row]:
        """The rows of one row group, their first ``keep`` registers; no other register's column is read.

        Raises ValueError naming the file where a page does not have its checksum.

        source: a file object to read from, in place of the shard's own file.
        """
        keep = self.facts["registers"] if keep is None else keep
        parts = [(a, b) for a, b in levels_of(self.facts["registers"]) if a < keep]
        # the checksum is that of all registers
        whole = keep == self.facts["registers"]
        names = [name for name in self.names if not name.startswith("ids_") and (whole or name != "checksum")]
        try:
            with self._open(source) as file:
                table = file.read_row_group(block, columns=[*names, *(_name(a, b) for a, b in parts)])
        except OSError as error:
            raise ValueError(f"{self.path}: row group {block} is damaged ({error})") from error
        ids = [_split(table[_name(a, b)], b - a) for a, b in parts]
        plain = {name: table[name].to_pylist() for name in names}
        shared = {name: self.facts[name] for name in FACTS if name != "registers"} | {"error": None}
        rows = []
        for i in range(table.num_rows):
            row = {name: values[i] for name, values in plain.items()}
            if whole:
                row["checksum"] = row["checksum"].hex()
            rows.append(row | shared | {"ids": np.concatenate([part[i] for part in ids], 1)[:, :keep]})
        return rows


def _split(column, width: int) -> list[np.ndarray]:
    """A list column -> uint16 [T, width] of each row."""
    array = column.combine_chunks()
    values, offsets = array.flatten().to_numpy(), array.offsets.to_numpy()
    offsets = offsets - offsets[0]
    return [values[a:b].reshape(-1, width) for a, b in pairwise(offsets)]

"""Rows: one video each, as engines pass them around, a list of dicts or a dict of columns.

What :class:`vft.data.Encoder` adds to a row, and what shards hold:

    key          str, the name of the video in its data set
    ids          uint16 [T, k], k registers of each of T latent frames; [0, k] in a row with an error
    frames       int, fps float, height int, width int: of the source; 0 in a row with an error
    model        str, name of the tokenizer; fingerprint: str, see vft.fingerprint
    levels       int64 [D], chunk int: as in VideoTokens
    checksum     SHA-256 of the .vft file of these tokens
    error        None, or why there are no tokens
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..tokens import VideoTokens

Row = dict[str, Any]
Batch = Mapping[str, Sequence] | Sequence[Mapping[str, Any]]


def rows_of(batch: Batch) -> list[Row]:
    """A batch as a list of rows: a list of dicts, or a dict of equally long columns (arrays, lists).

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(batch, Mapping):
        columns = {name: list(column) for name, column in batch.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"batch must have columns of one length, got {lengths}")
        names = list(columns)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if isinstance(batch, Sequence) and all(isinstance(row, Mapping) for row in batch):
        return [dict(row) for row in batch]
    raise TypeError(f"batch must be a dict of columns or a list of dicts, got {type(batch).__name__}")


def like(batch: Batch, rows: list[Row]) -> dict[str, np.ndarray] | list[Row]:
    """Rows in the form of a batch: columns for columns."""
    if not isinstance(batch, Mapping):
        return rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: column([row.get(name) for row in rows]) for name in names}


def column(values: list) -> np.ndarray:
    """Values of one column: numbers in an array of theirs, anything else (text, None, arrays) in one of objects."""
    if values and all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values):
        return np.array(values)
    made = np.empty(len(values), object)
    for i, value in enumerate(values):
        made[i] = value
    return made


def row_of(tokens: VideoTokens, key: str) -> Row:
    """The row of one video. Raises ValueError where ids do not fit into 16 bits."""
    data = tokens.to_bytes()
    return {
        "key": key, "ids": tokens.ids.cpu().numpy().astype(np.uint16), "frames": tokens.frames, "fps": tokens.fps,
        "height": tokens.height, "width": tokens.width, "model": tokens.model, "fingerprint": tokens.fingerprint,
        "levels": np.array(tokens.levels), "chunk": tokens.chunk, "checksum": hashlib.sha256(data).hexdigest(),
        "error": None,
    }  # fmt: skip


def error_row(key: str, error: str, registers: int) -> Row:
    """The row of a video without tokens."""
    return {
        "key": key, "ids": np.zeros((0, registers), np.uint16), "frames": 0, "fps": 0.0, "height": 0, "width": 0,
        "model": "", "fingerprint": "", "levels": np.zeros(0, np.int64), "chunk": 0, "checksum": "", "error": error,
    }  # fmt: skip


def tokens_of(row: Mapping[str, Any]) -> VideoTokens:
    """The tokens of a row without an error.

    Raises ValueError or TypeError for a missing or wrong value.
    """
    missing = {"ids", "frames", "fps", "height", "width", "model", "levels", "chunk"} - row.keys()
    if missing:
        raise ValueError(f"row must have {', '.join(sorted(missing))}")
    # engines may give nested lists, or arrays of arrays
    ids = np.stack([np.asarray(r) for r in row["ids"]]).astype(np.int64) if len(row["ids"]) else np.zeros((0, 0))
    return VideoTokens(
        torch.from_numpy(ids), float(row["fps"]), int(row["frames"]), int(row["height"]), int(row["width"]),
        str(row["model"]), tuple(int(level) for level in row["levels"]), int(row["chunk"]),
        str(row.get("fingerprint") or ""),
    )  # fmt: skip

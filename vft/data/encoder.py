"""Encoder: rows of videos to rows of tokens, many videos in a packed call."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..batch import Job, encode_jobs
from ..tokenizer import Tokenizer
from .rows import Batch, Row, error_row, like, row_of, rows_of


class Model:
    """A tokenizer that is loaded at first use, so that what holds it can be pickled and sent to another process.

    model: a name, path or hub id as :meth:`vft.Tokenizer.from_pretrained` takes it, or a Tokenizer, which is pickled
    whole.
    """

    def __init__(self, model: str | os.PathLike | Tokenizer, dtype: str | torch.dtype, device: str | None) -> None:
        self.model = model
        self.dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point torch.dtype or its name, got {dtype!r}")
        self.device = device
        self._loaded: Tokenizer | None = None

    def load(self) -> Tokenizer:
        if self._loaded is None:
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = (
                self.model
                if isinstance(self.model, Tokenizer)
                else Tokenizer.from_pretrained(self.model).to(device=device, dtype=self.dtype)
            )
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}


class Encoder:
    """A callable over batches of rows: videos in, tokens out; for ``map_batches``, a UDF, a stage of any engine.

    A row has ``path``, the name of a video file, or ``bytes``, the content of one; ``key`` names it (default: the path,
    or the SHA-256 of the bytes). The result has a row for each given one, in their order, with the columns that
    :mod:`vft.data.rows` lists; other columns of the row are kept, ``bytes`` is not. A row that cannot be encoded gets
    its reason in ``error`` and empty ``ids``; the others go on. The chunks of all videos share packed calls, so a value
    on the edge between two levels may round otherwise than in ``Tokenizer.encode``.

    Args:
        model: as in :meth:`vft.Tokenizer.from_pretrained`, loaded at the first call; or a Tokenizer, used as it is.
        keep: registers of each latent frame (default: all).
        dtype, device: of the model that is loaded (default: float32, CUDA where there is one).
        packed, readers, fps, strict: see :func:`vft.batch.encode_folder`.

    Raises:
        ValueError: an argument is out of range; at the first call where that depends on the model.
    """

    def __init__(
        self, model: str | os.PathLike | Tokenizer = "tiny", *, keep: int | None = None,
        dtype: str | torch.dtype = torch.float32, device: str | None = None, packed: int = 8, readers: int = 2,
        fps: float | None = None, strict: bool = False,
    ) -> None:  # fmt: skip
        for name, value in (("packed", packed), ("readers", readers), ("keep", 1 if keep is None else keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model = Model(model, dtype, device)
        self.keep, self.packed, self.readers, self.fps, self.strict = keep, packed, readers, fps, strict

    def __call__(self, batch: Batch) -> Any:
        rows = rows_of(batch)
        tokenizer = self.model.load()
        keep = tokenizer.registers if self.keep is None else self.keep
        if keep > tokenizer.registers:
            raise ValueError(f"keep must be between 1 and {tokenizer.registers}, got {keep}")
        made: list[Row] = [{}] * len(rows)
        jobs: dict[Job, int] = {}
        for i, row in enumerate(rows):
            try:
                jobs[self._job(row)] = i
            except ValueError as error:
                made[i] = error_row(str(row.get("key") or ""), str(error), keep)
        for job in encode_jobs(tokenizer, list(jobs), self.packed, self.readers, self.strict):
            made[jobs[job]] = self._row(job, tokenizer, keep)
            job.ids.clear()
        kept = [{name: value for name, value in row.items() if name != "bytes"} for row in rows]
        return like(batch, [old | new for old, new in zip(kept, made, strict=True)])

    def _job(self, row: Mapping[str, Any]) -> Job:
        path, data = row.get("path"), row.get("bytes")
        asked = {} if self.fps is None else {"fps": self.fps}
        if isinstance(data, (bytes, bytearray, memoryview)):
            data = bytes(data)
            key = row.get("key") or path or hashlib.sha256(data).hexdigest()
            return Job(str(key), Path(), asked=asked, data=data)
        if data is None and isinstance(path, (str, os.PathLike)) and os.fspath(path):
            return Job(str(row.get("key") or os.fspath(path)), Path(path), asked=asked)
        raise ValueError("row must have path, the name of a file, or bytes, its content")

    @staticmethod
    def _row(job: Job, tokenizer: Tokenizer, keep: int) -> Row:
        if job.error is None:
            fps, height, width = job.source
            try:
                tokens = tokenizer.join_chunks(job.ids, job.still, fps, job.frames, height, width).truncate(keep)
                return row_of(tokens, job.file)
            except ValueError as error:
                job.fail(error)
        return error_row(job.file, str(job.error), keep)

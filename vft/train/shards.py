"""Token shards as the data of a run: any row at any step, so a run resumes wherever it stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.dataset import TokenDataset
from ..data.shards import KINDS, find_shards
from ..tokenizer import Tokenizer

# blocks of rows kept in memory; a run draws at random
CACHED = 1024


def holds_shards(source: str | os.PathLike) -> bool:
    """Whether this is a shard, or a folder with one in it."""
    path = Path(source)
    return path.suffix.removeprefix(".") in KINDS if path.is_file() else path.is_dir() and bool(find_shards(path))


class TokenShards:
    """The ids ``[T, N]`` of the rows of shards, as :class:`vft.train.data.TokenFiles` gives those of files.

    The class of a row is the first folder in its key, ``video`` for a key without one. Clip ``index`` is row ``index %
    rows``. Errors are those of :class:`vft.data.TokenDataset`: a shard that cannot be read stops the run.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, registers: int) -> None:
        self.skipped: dict[str, str] = {}
        self.rows = TokenDataset(
            source, keep=registers, model=tokenizer.name, fingerprint=tokenizer.fingerprint, cached=CACHED
        )
        self.longest = max(self.rows.latent_frames())
        keys = self.rows.keys()
        groups = [key.split("/")[0] if "/" in key else "video" for key in keys]
        self.classes = tuple(sorted(set(groups)))
        numbers = {group: i for i, group in enumerate(self.classes)}
        self._labels = [numbers[group] for group in groups]
        self._digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]

    def label(self, index: int) -> int:
        return self._labels[index % len(self.rows)]

    def facts(self) -> dict:
        """What must be the same when a run is resumed."""
        return {"rows": len(self.rows), "digest": self._digest}

    def start_workers(self, count: int, device: torch.device | None = None) -> None:
        """Nothing to render."""

    def close(self) -> None:
        """Nothing to end."""

    def fetch(self, indices: Sequence[int]) -> None:
        """Nothing to read ahead."""

    def batch(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [self.rows[i % len(self.rows)]["ids"] for i in indices]

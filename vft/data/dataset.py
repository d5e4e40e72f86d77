"""Tokens for any trainer: rows by number, or a shuffled stream that resumes in the middle of a shard."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..batch import shard as process_shard
from ..tokens import VideoTokens
from .rows import Row, row_of, tokens_of
from .shards import find_shards, open_shard

_SUFFIX = ".vft"
_BLOCK = 64
# of the sample that a trainer gets; arrays and texts that no step needs stay out
_LEFT_OUT = ("levels", "chunk", "error", "model", "fingerprint", "checksum")


class TokenFiles:
    """The ``.vft`` files below a folder as one shard; a key is the file's name in the folder without its suffix."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._files = sorted(folder.rglob(f"*{_SUFFIX}"))
        self.blocks = [min(_BLOCK, len(self._files) - i) for i in range(0, len(self._files), _BLOCK)]
        self.facts = _facts(VideoTokens.load(self._files[0]))

    def keys(self) -> list[str]:
        return [file.relative_to(self.path).as_posix().removesuffix(_SUFFIX) for file in self._files]

    def latent_frames(self) -> list[int]:
        return [VideoTokens.load(file).latent_frames for file in self._files]

    def read(self, block: int, keep: int | None) -> list[Row]:
        rows = []
        for file in self._files[block * _BLOCK : (block + 1) * _BLOCK]:
            tokens = VideoTokens.load(file)
            _check(file, self.facts, _facts(tokens))
            if keep is not None and tokens.registers < keep:
                raise ValueError(f"{file}: keep must be between 1 and {tokens.registers}, got {keep}")
            row = row_of(tokens, file.relative_to(self.path).as_posix().removesuffix(_SUFFIX))
            rows.append(row | {"ids": row["ids"][:, :keep]})
        return rows


def _facts(tokens: VideoTokens) -> dict[str, Any]:
    return {
        "model": tokens.model, "fingerprint": tokens.fingerprint, "levels": list(tokens.levels), "chunk": tokens.chunk,
        "registers": tokens.registers,
    }  # fmt: skip


def _check(path: Path, wanted: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises ValueError naming the file where its tokens are of another model; an unknown fingerprint is none."""
    for name in ("model", "levels", "fingerprint"):
        known = name != "fingerprint" or (wanted[name] and facts[name])
        if known and facts[name] != wanted[name]:
            raise ValueError(f"{path}: {name} must be {wanted[name]!r}, got {facts[name]!r}")


class TokenDataset(Dataset):
    """Rows of tokens by number, from a folder of shards or of ``.vft`` files, a shard, or a list of shards.

    An item is a dict: ``key``, ``ids`` int64 ``[T, keep]``, ``frames``, ``fps``, ``height``, ``width`` and what other
    columns the shard has. Blocks of rows are read whole and the latest ``cached`` are kept: :meth:`stream` reads so.

    Args:
        keep: registers of each latent frame (default: those of the shard that has fewest). Of a Parquet shard no other
            register is read.
        model, fingerprint: what the tokens must be of (default: those of the first shard, where it states them).

    Raises:
        ValueError: no tokens there; a shard that is cut off, damaged, of another model, or has fewer registers.
        OSError: a file cannot be read. ImportError: Parquet without pyarrow.
    """

    def __init__(
        self, source: str | os.PathLike | Sequence[str | os.PathLike], *, keep: int | None = None,
        model: str | None = None, fingerprint: str | None = None, cached: int = 16,
    ) -> None:  # fmt: skip
        if cached < 1:
            raise ValueError(f"cached must be at least 1, got {cached}")
        self.shards = _open(source)
        first = self.shards[0].facts
        self.model = first["model"] if model is None else model
        least = min(shard.facts["registers"] for shard in self.shards)
        self.keep = least if keep is None else keep
        stated = next((shard.facts["fingerprint"] for shard in self.shards if shard.facts["fingerprint"]), "")
        fingerprint = stated if fingerprint is None else fingerprint
        wanted = {"model": self.model, "levels": first["levels"], "fingerprint": fingerprint}
        for shard in self.shards:
            facts = shard.facts
            _check(shard.path, wanted, facts)
            if not 1 <= self.keep <= facts["registers"]:
                raise ValueError(f"{shard.path}: keep must be between 1 and {facts['registers']}, got {self.keep}")
        self.blocks = [(s, b, n) for s, shard in enumerate(self.shards) for b, n in enumerate(shard.blocks)]
        self.starts = np.concatenate([[0], np.cumsum([n for _, _, n in self.blocks])])
        self.cached = cached
        self._cache: OrderedDict[int, list[Row]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {index}")
        index %= len(self)
        block = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.item(block, index - int(self.starts[block]))

    def item(self, block: int, i: int) -> dict[str, Any]:
        """Row i of a block."""
        if block in self._cache:
            self._cache.move_to_end(block)
        else:
            shard, inside, _ = self.blocks[block]
            self._cache[block] = self.shards[shard].read(inside, self.keep)
            while len(self._cache) > self.cached:
                self._cache.popitem(last=False)
        row = {name: value for name, value in self._cache[block][i].items() if name not in _LEFT_OUT}
        return row | {"ids": torch.from_numpy(row["ids"].astype(np.int64))}

    def keys(self) -> list[str]:
        """The key of every row."""
        return [key for shard in self.shards for key in shard.keys()]

    def latent_frames(self) -> list[int]:
        """T of every row."""
        return [n for shard in self.shards for n in shard.latent_frames()]

    def damaged(self) -> dict[str, str]:
        """Reads every row whole: {key: why} of those whose tokens do not have their checksum, and of double keys."""
        found, seen = {}, set()
        for shard in self.shards:
            for block in range(len(shard.blocks)):
                for row in shard.read(block, None):
                    again = row_of(tokens_of(row), row["key"])["checksum"]
                    if again != row["checksum"]:
                        found[row["key"]] = f"checksum must be {row['checksum']}, got {again}"
                    if row["key"] in seen:
                        found[row["key"]] = "key is there twice"
                    seen.add(row["key"])
        return found

    def stream(self, **options) -> TokenStream:
        """:class:`TokenStream` over these rows."""
        return TokenStream(self, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}


class TokenStream(IterableDataset):
    """The rows of a :class:`TokenDataset` once an epoch, this process's share of them; each ``iter`` is one epoch.

    Blocks are shuffled by (seed, epoch), then the rows of ``window`` neighbouring blocks among each other. All
    processes get equally many rows; up to world_size - 1 of an epoch, others in each, are left out. Under a DataLoader
    the workers divide the share.

    :meth:`state_dict` is the epoch and the rows taken from it: a stream that loads it goes on with the next row, in the
    middle of a shard too. With workers, use a loader that asks each of them (torchdata's StatefulDataLoader).

    Args:
        shuffle: False: in their order.
        rank, world_size: default: as torchrun states them, see :func:`vft.batch.shard`.

    Raises:
        ValueError: a number is out of range, or there are fewer rows than processes.
    """

    def __init__(
        self, dataset: TokenDataset, *, seed: int = 0, shuffle: bool = True, rank: int | None = None,
        world_size: int | None = None, window: int = 8,
    ) -> None:  # fmt: skip
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank and world_size must be given together, got {rank} and {world_size}")
        given = None if rank is None or world_size is None else (rank, world_size)
        self.rank, self.world_size = given or process_shard()
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be between 0 and {self.world_size - 1}, got {self.rank}")
        if not 1 <= window <= dataset.cached:
            raise ValueError(f"window must be between 1 and the {dataset.cached} blocks cached, got {window}")
        if len(dataset) < self.world_size:
            raise ValueError(f"dataset must have a row for each of {self.world_size} processes, got {len(dataset)}")
        self.dataset, self.seed, self.shuffle, self.window = dataset, seed, shuffle, window
        self.epoch = self.taken = 0

    def __len__(self) -> int:
        return len(self.dataset) // self.world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for block, i in self._order()[self.taken :]:
            item = self.dataset.item(block, i)
            # before the row is given: a state that is asked for while it is used counts it
            self.taken += 1
            yield item
        self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken, **self._fixed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where the state is of another data set, seed or number of processes."""
        for name, value in self._fixed().items():
            if state.get(name) != value:
                raise ValueError(f"{name} must be {state.get(name)!r} as in the state, got {value!r}")
        self.epoch, self.taken = state["epoch"], state["taken"]

    def _fixed(self) -> dict[str, Any]:
        return {
            "rows": len(self.dataset), "seed": self.seed, "shuffle": self.shuffle, "window": self.window,
            "world_size": self.world_size,
        }  # fmt: skip

    def _order(self) -> list[tuple[int, int]]:
        """(block, row in it) of this process's, or worker's, rows of the epoch."""
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = len(self)
        first, last = (self.rank * share + share * p // parts for p in (part, part + 1))
        rng = np.random.default_rng((self.seed, self.epoch))
        blocks = rng.permutation(len(self.dataset.blocks)) if self.shuffle else np.arange(len(self.dataset.blocks))
        counts = np.array([self.dataset.blocks[b][2] for b in blocks])
        order, position = [], 0
        for start in range(0, len(blocks), self.window):
            rows = []
            for b, count in zip(blocks[start : start + self.window], counts[start : start + self.window], strict=True):
                rows += [(int(b), i) for i in range(max(first - position, 0), min(last - position, count))]
                position += count
            if self.shuffle:
                # one generator a window and part: what others take does not matter
                shuffled = np.random.default_rng((self.seed, self.epoch, first, start)).permutation(len(rows))
                rows = [rows[i] for i in shuffled]
            order += rows
        return order


def _open(source) -> list:
    if not isinstance(source, (str, os.PathLike)):
        paths = list(source)
        if not paths:
            raise ValueError("source must name at least one shard")
        return [open_shard(path) for path in paths]
    path = Path(source)
    if path.is_file():
        return [open_shard(path)]
    if not path.is_dir():
        raise OSError(f"{path}: no such file or folder")
    if next(path.rglob(f"*{_SUFFIX}"), None) is not None:
        return [TokenFiles(path)]
    shards = [open_shard(shard) for shard in find_shards(path)]
    if not shards:
        raise ValueError(f"{path}: neither shards nor .vft files in it")
    return shards

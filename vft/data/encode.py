"""A folder of videos to a folder of shards, here or by an engine: no video lost, none twice, wherever it is stopped.

The sorted videos are cut into parts of ``shard_size``; what of a part is in no finished shard becomes one shard,
``shard-<12 hex digits of the SHA-256 of its keys>``. So parts need not know of each other, a part that is done again
after a crash replaces its own shard, and a run that was killed goes on with the videos that are left. A key is the path
of a video below the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..batch import Summary
from ..files import only_writer
from ..scan import scan
from .encoder import Encoder
from .index import SUFFIX, Index, check_whole, load_index
from .rows import Batch, Row, like, rows_of
from .shards import KINDS, write_shard

Engine = Callable[[list[Row], "ShardWriter"], Iterable[Row]]


class ShardWriter:
    """A callable over rows {``shard``, ``keys``}: encodes the videos and writes the shard, in whatever process.

    Gives {``shard``, ``rows``, ``errors``, ``failure``}: the number of rows, the errors of the index as JSON, and why
    the shard could not be written (a full disk), else "". The folders must be the same for all processes.
    """

    def __init__(self, encoder: Encoder, source: str | os.PathLike, output: str | os.PathLike) -> None:
        self.encoder, self.source, self.output = encoder, Path(source).absolute(), Path(output).absolute()

    def __call__(self, batch: Batch) -> Any:
        return like(batch, [self.write(str(row["shard"]), [str(key) for key in row["keys"]]) for row in rows_of(batch)])

    def write(self, shard: str, keys: list[str]) -> Row:
        rows = self.encoder([{"key": key, "path": str(self.source / key)} for key in keys])
        try:
            index = write_shard(self.output / shard, rows)
        except OSError as error:
            return self.failed(shard, error.strerror or str(error))
        return {"shard": shard, "rows": len(index.key), "errors": json.dumps(index.errors), "failure": ""}

    @staticmethod
    def failed(shard: str, failure: str) -> Row:
        """What is given for a shard that is not written, and why."""
        return {"shard": shard, "rows": 0, "errors": "[]", "failure": failure}


def here(tasks: list[Row], writer: ShardWriter) -> Iterator[Row]:
    """The engine of one process."""
    for task in tasks:
        yield writer.write(task["shard"], task["keys"])


def encode_shards(
    source: str | os.PathLike, output: str | os.PathLike, encoder: Encoder, *, kind: str = "tar",
    shard_size: int = 1000, engine: Engine = here, rank: int = 0, world_size: int = 1,
    progress: Callable[[int, int, list[dict[str, str]]], None] = lambda done, total, errors: None,
) -> Summary:  # fmt: skip
    """Encodes the videos below ``source`` that are in no finished shard of ``output``.

    Args:
        kind: ``tar`` or ``parquet``; shard_size: videos of a shard.
        engine: gets the tasks and what does one, and gives what that returns, in any order.
        rank, world_size: every ``world_size``-th part is done, from the ``rank``-th on.
        progress: called with videos done, videos in all and the errors of a shard, at the start and after each shard.

    A video that cannot be encoded is named in the index of its shard, counted, and tried again by the next run. A video
    that has changed since it was encoded is not seen: use another folder.

    Raises:
        ValueError: no videos; a number is out of range; ``output`` holds shards of another model or keep.
        OSError: a shard could not be written; the finished ones stay. Another run writes into ``output``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
    found = scan(source)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise OSError(f"output {str(output)!r} must be a folder, got a file")
    output.mkdir(parents=True, exist_ok=True)
    with only_writer(output, rank, world_size):
        finished = _finished(output, encoder)
        starts = range(rank * shard_size, len(found.videos), world_size * shard_size)
        parts = [found.videos[start : start + shard_size] for start in starts]
        tasks = []
        for part in parts:
            keys = [key for key in part if key not in finished]
            if keys:
                name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:12]
                tasks.append({"shard": f"shard-{name}.{kind}", "keys": keys})
        total, todo = sum(map(len, parts)), sum(len(task["keys"]) for task in tasks)
        done, failed = total - todo, 0
        progress(done, total, [])
        for row in engine(tasks, ShardWriter(encoder, source, output)) if tasks else ():
            if row["failure"]:
                raise OSError(f"{output / row['shard']}: {row['failure']}")
            errors = json.loads(row["errors"])
            failed += len(errors)
            done += int(row["rows"]) + len(errors)
            progress(done, total, errors)
        return Summary(todo - failed, total - todo, failed, found.left_out)


def _finished(output: Path, encoder: Encoder) -> set[str]:
    """Keys in finished shards; a shard that is cut off or gone is forgotten, so that its videos are encoded again."""
    tokenizer = encoder.model.load()
    wanted = {
        "model": tokenizer.name, "fingerprint": tokenizer.fingerprint, "registers": encoder.keep or tokenizer.registers,
    }  # fmt: skip
    keys: set[str] = set()
    for path in sorted(output.glob(f"*{SUFFIX}")):
        index = load_index(path)
        if index.shard is None or not _whole(output / index.shard, index):
            path.unlink(missing_ok=True)
            continue
        for name, value in wanted.items():
            if index.facts[name] != value:
                raise ValueError(f"{path}: {name} must be {value!r} as asked for, got {index.facts[name]!r}")
        keys.update(index.key)
    return keys


def _whole(path: Path, index: Index) -> bool:
    try:
        check_whole(path, index)
    except (ValueError, OSError):
        return False
    return True

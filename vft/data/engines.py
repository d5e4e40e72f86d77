"""Engines that spread shards over processes and machines: Ray Data and Daft, each in a few lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from ..deferred import Deferred
from .encode import Engine, ShardWriter
from .rows import Row, like, rows_of

# of one shard: a worker that dies may have been preempted, but a video may also end every process that reads it
TRIES = 4
_TRIES_SUFFIX = ".tries"

ray = Deferred("ray", "the engine ray", "'ray[data]'")
ray_data = Deferred("ray.data", "the engine ray", "'ray[data]'")
daft = Deferred("daft", "the engine daft", "daft")


def make(name: str, workers: int, gpus: float) -> Engine:
    """The engine ``ray`` or ``daft`` with ``workers`` processes, each of which has ``gpus`` GPUs."""
    return partial({"ray": with_ray, "daft": with_daft}[name], workers=workers, gpus=gpus)


def with_ray(tasks: list[Row], writer: ShardWriter, workers: int, gpus: float) -> Iterator[Row]:
    """Ray Data: an actor a worker. Joins the cluster that RAY_ADDRESS names, else starts one on this machine.

    An actor that dies is started again and its shard done again, up to TRIES times in all. Raises RuntimeError where
    Ray itself fails.
    """
    for left in writer.output.glob(f"*{_TRIES_SUFFIX}"):
        left.unlink()
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = ray_data.DataContext.get_current()
    context.enable_progress_bars = False
    if not ray.is_initialized():
        # quiet: of the C++ side by a variable, of Ray Data after its import, which sets levels of its own
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    done = ray_data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        _Actor, fn_constructor_args=(writer,), batch_size=1, batch_format="numpy",
        compute=ray_data.ActorPoolStrategy(size=min(workers, len(tasks))), num_gpus=gpus, num_cpus=threads,
    )  # fmt: skip
    try:
        yield from done.iter_rows()
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"the engine ray failed: {str(error).strip().splitlines()[0]}") from error


class _Actor:
    """Ray Data takes a class, and begins a shard whose worker dies again for ever: a file beside it counts that."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer

    def __call__(self, batch):
        return like(batch, [self._write(str(row["shard"]), row["keys"]) for row in rows_of(batch)])

    def _write(self, shard: str, keys: Iterable[str]) -> Row:
        tries = self.writer.output / f".{shard}{_TRIES_SUFFIX}"
        try:
            with open(tries, "a") as file:
                file.write(".")
            if tries.stat().st_size > TRIES:
                raise RuntimeError(f"its worker died {TRIES} times, of memory or of one of its videos")
            done = self.writer.write(shard, [str(key) for key in keys])
        # what is raised here would reach the driver inside pages of Ray's own
        except Exception as error:
            done = self.writer.failed(shard, f"{type(error).__name__}: {' '.join(str(error).split())}")
        with suppress(OSError):
            tries.unlink()
        return done


def with_daft(tasks: list[Row], writer: ShardWriter, workers: int, gpus: float) -> Iterator[Row]:
    """Daft: a class of which each of ``workers`` processes has an instance, called for one shard after another."""

    class Writer:
        def __init__(self) -> None:
            self.writer = writer

        def __call__(self, shard: str, keys: list[str]) -> Row:
            return self.writer.write(shard, keys)

    kind = daft.DataType
    returned = kind.struct(
        {"shard": kind.string(), "rows": kind.int64(), "errors": kind.string(), "failure": kind.string()}
    )
    Writer.__call__ = daft.method(return_dtype=returned)(Writer.__call__)
    write = daft.cls(Writer, max_concurrency=workers, gpus=gpus, use_process=True)()
    # a batch is what one process gets
    table = daft.from_pylist(tasks).into_batches(1)
    for row in table.select(write(daft.col("shard"), daft.col("keys")).alias("done")).iter_rows():
        yield row["done"]

"""Progress of long work on standard error: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

# between lines; work that is over sooner prints none
SECONDS = 10.0


class Lines:
    """What is used of tqdm, as lines: ``train: step 120 of 8500, loss 0.1234, 00:44:10 left``."""

    def __init__(
        self, iterable: Iterable | None = None, *, desc: str = "", total: int | None = None, unit: str = "it",
        initial: int = 0,
    ) -> None:  # fmt: skip
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.desc, self.total, self.unit = iterable, desc, total, unit
        self.n = self.first = initial
        self.postfix = ""
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_) -> None:
        pass

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def set_postfix(self, **facts) -> None:
        self.postfix = "".join(f", {name.replace('_', ' ')} {value}" for name, value in facts.items())

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.printed >= SECONDS:
            self.printed = now
            print(f"{self.desc}: {self.unit} {self.n}{self._of()}{self.postfix}{self._left(now)}", file=sys.stderr)

    def _of(self) -> str:
        return "" if self.total is None else f" of {self.total}"

    def _left(self, now: float) -> str:
        if self.total is None or self.n == self.first:
            return ""
        seconds = int((now - self.started) / (self.n - self.first) * (self.total - self.n))
        return f", {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def bar(iterable: Iterable | None = None, *, hidden: bool = False, position: int | None = None, **options):
    """A context, and an iterator over ``iterable`` where one is given; ``options``: desc, total, unit, initial.

    ``update(n)``, ``n``, ``total`` and ``set_postfix`` as in tqdm; ``position`` is the bar's row on a terminal.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(iterable, leave=False, disable=hidden, position=position, **options)
    return Lines(iterable, **options)

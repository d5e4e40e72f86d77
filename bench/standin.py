"""A kernel to tune where there is no GPU: it waits, least for one of its tiles, and is wrong for another."""

import time

import torch
from cases.case import CASES, Case

from flexkernels import tuning

KERNEL, CASE = "standin", "standin"
FAST, WRONG = 64, 16


def launch() -> int:
    block = tuning.choose(KERNEL, bytes=4)["block"]
    time.sleep(0.0005 if block == FAST else 0.002 if block != WRONG else 0.0)
    return block


def make(device: str) -> Case:
    wrong = lambda: "wrong" if launch() == WRONG else None  # noqa: E731
    return Case(torch.float32, [1], launch, {}, wrong, 4, 1000)


CASES[CASE] = make
for table in tuning.TABLES.values():
    table["entries"][KERNEL] = [
        {"if": {"bytes": 2}, "use": {"block": 8, "warps": 1}},
        {"if": {}, "use": {"block": FAST // 2, "warps": 1}},
    ]

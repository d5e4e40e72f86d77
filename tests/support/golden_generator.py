"""Small random generators of the published implementation: their conditions and what it computes with them."""

from functools import cache

from paths import GENERATORS
from safetensors.torch import load_file

CASES = ("ar_class", "ar_text")


@cache
def io(case):
    return load_file(GENERATORS / case / "io.safetensors")


def conditions(case, rows=slice(None)):
    if case == "ar_class":
        return {"class_id": io(case)["class_id"][rows]}
    return {"text_emb": io(case)["text_emb"][rows], "text_mask": io(case)["text_mask"][rows]}

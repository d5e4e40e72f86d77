"""Captions of a few words and their embeddings, a fixed table: text for a small generator without a language model.

:mod:`vft.train.named` renders the clips that they name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch

# what text.encode_captions calls the table, and the width that tells a generator's captions are these
NAME, WIDTH = "words", 64
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("disc", "square", "triangle", "ring")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "turning", "resting")
WORDS = (*COLOURS, *SHAPES, *dict.fromkeys(" ".join(MOTIONS).split()))
# said without a meaning
EMPTY = ("a", "an", "the")


def embed(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """``text_emb`` float32 ``[n, c, WIDTH]`` and bool ``text_mask [n, c]``: a row a word, zeros beyond a caption's end.

    Raises ValueError for a caption with a word that is not in WORDS, or without any.
    """
    rows = [[WORDS.index(word) for word in _words(caption)] for caption in captions]
    longest = max(map(len, rows))
    emb, mask = torch.zeros(len(rows), longest, WIDTH), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        emb[i, : len(row)], mask[i, : len(row)] = _table()[row], True
    return emb, mask


def _words(caption: str) -> list[str]:
    words = [word for word in re.findall(r"\w+", caption.lower()) if word not in EMPTY]
    for word in words:
        if word not in WORDS:
            raise ValueError(f"caption must be made of the words {', '.join(WORDS)}, got {word!r}")
    if not words:
        raise ValueError(f"caption must have at least one word, got {caption!r}")
    return words


@cache
def _table() -> torch.Tensor:
    """``[len(WORDS), WIDTH]``: rows of a Hadamard matrix, entries of 1 and -1, so that words are orthogonal."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < WIDTH:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    # the first row is even: a mean over channels would not see it
    return hadamard[1 : 1 + len(WORDS)]

"""Captions as embeddings: from a safetensors file, by the table of :mod:`vft.words`, or through an umT5 encoder (the
``text`` extra)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import words

# encoders by the width of their embeddings: the table of words, and umT5 (arXiv 2304.09151)
ENCODERS = {
    words.WIDTH: words.NAME, 512: "google/umt5-small", 768: "google/umt5-base", 2048: "google/umt5-xl",
    4096: "google/umt5-xxl",
}  # fmt: skip


def load_embeddings(path: str | os.PathLike) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``text_emb [n, c, d]`` (or ``[c, d]``: one caption) and ``text_mask [n, c]``, if there is one, of a file.

    Raises:
        ValueError: no safetensors file, or one with other tensors.
        OSError: the file cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(2, "No such file", os.fspath(path))
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
    if "text_emb" not in tensors or tensors.keys() - {"text_emb", "text_mask"}:
        raise ValueError(
            f"{path} must hold text_emb and at most text_mask, got {', '.join(sorted(tensors)) or 'nothing'}"
        )
    emb, mask = tensors["text_emb"], tensors.get("text_mask")
    emb = emb[None] if emb.dim() == 2 else emb
    mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    if emb.dim() != 3 or (mask is not None and mask.shape != emb.shape[:2]):
        shape = None if mask is None else list(mask.shape)
        raise ValueError(f"{path} must hold text_emb [n, c, d] and text_mask [n, c], got {list(emb.shape)} and {shape}")
    return emb, mask


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    reference: str | os.PathLike,
    *,
    max_length: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``text_emb [n, c, d]`` and bool ``text_mask [n, c]``: the last hidden states of an umT5 encoder, or what
    :func:`vft.words.embed` gives where ``reference`` is its name.

    Else ``reference`` is a hub id or a directory with the encoder and its tokenizer; captions are cut at ``max_length``
    tokens.

    Raises:
        ImportError: without the ``text`` extra.
        ValueError: the encoder cannot be had; a word that the table lacks.
    """
    if reference == words.NAME:
        return tuple(t.to(device) for t in words.embed(captions))
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError as error:
        raise ImportError("captions need transformers: pip install 'flexkernels[text]', or give embeddings") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
        encoder = UMT5EncoderModel.from_pretrained(reference).to(device=device, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text encoder {str(reference)!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    batch = tokenizer(list(captions), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    mask = batch["attention_mask"].to(device)
    hidden = encoder(input_ids=batch["input_ids"].to(device), attention_mask=mask).last_hidden_state
    return hidden, mask.bool()

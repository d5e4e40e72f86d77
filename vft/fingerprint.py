"""A short name for what decides the ids of a tokenizer: its encoder's weights and config, and the latent codec's.

Tokens carry it, so that they are not decoded by another model. A decoder may be trained further: ids mean the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterable

import torch

# values of each tensor that are looked at, evenly spread: training moves nearly all, and a billion are read at once
SAMPLES = 4096
_FIELDS = (
    "codec", "levels", "patch", "channels", "encoder", "encoder_head", "registers", "chunk_size", "overlap", "size",
)  # fmt: skip
_FORM = re.compile(r"[0-9a-f]{16}")


class TokensWarning(UserWarning):
    """Tokens do not say which weights made them, or are asked of a generator that has not learned them."""


def fingerprint(tokenizer) -> str:
    """16 hexadecimal digits of the SHA-256 of a :class:`vft.Tokenizer`'s encoder: config, float32 weights, and those of
    the latent codec's encoder that a checkpoint holds (an embedded codec's name is in the config)."""
    facts = dataclasses.asdict(tokenizer.config)
    digest = hashlib.sha256(json.dumps({name: facts[name] for name in _FIELDS}).encode())
    codec = {name: value for name, value in (tokenizer.codec_state or {}).items() if ".encoder." in name}
    add_tensors(digest, sorted([*tokenizer.encoder.named_parameters(), *codec.items()]))
    return digest.hexdigest()[:16]


def add_tensors(digest, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Adds names, shapes and some float32 values to a hash of :mod:`hashlib`."""
    for name, value in named:
        digest.update(f"{name} {list(value.shape)}".encode())
        some = value.detach().flatten()[:: max(1, value.numel() // SAMPLES)]
        digest.update(some.float().cpu().numpy().astype("<f4").tobytes())


def check_form(value: str) -> str:
    """A fingerprint, or nothing where it is not known. Raises ValueError for anything else."""
    if not isinstance(value, str) or (value and not _FORM.fullmatch(value)):
        raise ValueError(f"fingerprint must be 16 hexadecimal digits or '', got {value!r}")
    return value


def check_tokens(tokens, tokenizer, force: bool = False) -> None:
    """Of :class:`vft.VideoTokens` that a :class:`vft.Tokenizer` is to decode: raises ValueError for those of another
    model; warns where they, as those of old files, do not say. ``force``: neither.
    """
    if force or tokens.fingerprint == tokenizer.fingerprint:
        return
    if not tokens.fingerprint:
        warnings.warn(
            f"these tokens do not say which weights made them, only the name {tokens.model!r}: decoded by "
            f"{tokenizer.name!r} unchecked",
            TokensWarning,
            stacklevel=3,
        )
        return
    raise ValueError(
        f"tokens must be of the model that decodes, {tokenizer.name!r} (fingerprint {tokenizer.fingerprint}), got "
        f"those of {tokens.model!r} ({tokens.fingerprint}); force=True or --force decodes them all the same"
    )

"""What a generator is asked for, checked: a class or a caption for each row."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from .config import GeneratorConfig

# class names that an error lists
SHOWN = 20


def check_conditions(
    config: GeneratorConfig, class_id, text_emb, text_mask, n: int | None, like: torch.Tensor
) -> list[int | torch.Tensor | None]:
    """One condition a row: a class index, or caption embeddings ``[c, ctx_dim]``; None is the null condition.

    Captions get the device and dtype of ``like``; rows that share one hold one tensor. Raises TypeError or ValueError
    naming the argument.
    """
    if config.cond == "class":
        if text_emb is not None or text_mask is not None:
            raise ValueError("text_emb must not be given: this model is conditioned on classes, give class_id")
        found = _classes(config, class_id)
    else:
        if class_id is not None:
            raise ValueError("class_id must not be given: this model is conditioned on text, give text_emb")
        found = _captions(config, text_emb, text_mask, like)
    n = len(found) if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an int of at least 0, got {n!r}")
    if len(found) == 1:
        return found * n
    if len(found) != n:
        raise ValueError(f"class_id or text_emb must hold 1 or n = {n} rows, got {len(found)}")
    return found


def class_index(classes: Sequence[str], name: str) -> int:
    """The index of a class name. Raises ValueError that suggests near names and lists the classes."""
    if name in classes:
        return classes.index(name)
    if not classes:
        raise ValueError(f"class {name!r} cannot be looked up: the model names no classes")
    lowered = {known.lower(): known for known in classes}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, 5, 0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    more = f" and {len(classes) - SHOWN} more, which vft info MODEL lists" if len(classes) > SHOWN else ""
    raise ValueError(f"class {name!r} is not known: {hint}the classes are {', '.join(classes[:SHOWN])}{more}")


def _classes(config: GeneratorConfig, class_id) -> list[int]:
    if class_id is None:
        raise ValueError("class_id must be given: this model is conditioned on classes")
    if isinstance(class_id, torch.Tensor):
        if class_id.is_floating_point() or class_id.dim() > 1:
            raise ValueError(f"class_id must be int [n], got {class_id.dtype} {list(class_id.shape)}")
        class_id = class_id.tolist()
    rows = [class_id] if isinstance(class_id, (int, str)) else list(class_id)
    rows = [class_index(config.classes, row) if isinstance(row, str) else row for row in rows]
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, int):
            raise TypeError(f"class_id must hold ints or class names, got {type(row).__name__}")
        if not 0 <= row < config.n_classes:
            raise ValueError(f"class_id must lie in 0..{config.n_classes - 1}, got {row}")
    return rows


def _captions(config: GeneratorConfig, text_emb, text_mask, like: torch.Tensor) -> list[torch.Tensor | None]:
    if text_emb is None:
        raise ValueError("text_emb must be given: this model is conditioned on text")
    single = isinstance(text_emb, torch.Tensor) and text_emb.dim() == 2
    rows = [text_emb] if single else list(text_emb)
    masks = [None] * len(rows)
    if text_mask is not None:
        masks = [text_mask] if single and text_mask.dim() == 1 else list(text_mask)
        if len(masks) != len(rows):
            raise ValueError(f"text_mask must have {len(rows)} rows like text_emb, got {len(masks)}")
    return [_caption(config.ctx_dim, row, mask, like) for row, mask in zip(rows, masks, strict=True)]


def _caption(width: int, row: torch.Tensor, mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    if not isinstance(row, torch.Tensor) or not row.is_floating_point():
        raise TypeError(f"text_emb must be floating-point tensors, got {getattr(row, 'dtype', type(row).__name__)}")
    if row.dim() != 2 or row.shape[1] != width:
        raise ValueError(f"text_emb must have [c, {width}] a row, got {list(row.shape)}")
    if mask is not None:
        if mask.shape != row.shape[:1]:
            raise ValueError(f"text_mask must have {len(row)} entries a row, got {list(mask.shape)}")
        row = row[mask.to(row.device).bool()]
    if not torch.isfinite(row).all():
        raise ValueError("text_emb must be finite, got NaN or infinity")
    return row.to(like.device, like.dtype) if len(row) else None

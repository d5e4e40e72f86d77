"""SemanTok's tokenizer checkpoints (Stability-AI/SemanTok, arXiv 2610.00686): retrained VideoFlexTok models.

Their config.json holds the published VideoFlexTok config under ``videoflextok``, what the encoder reads beside it under
``semantok``, and under ``hub_vae`` the repository with the VidTok weights, where these are not in the file.
"""

from __future__ import annotations

from typing import Any

import torch

from . import checkpoint
from .config import ConfigError
from .schema import field_of

# what the published code decodes with
SAMPLER = {"steps": 50, "guidance": {"type": "APG", "scale": 3.0, "threshold": 0.6, "eta": 0.0, "momentum": 0.0}}
# an encoder that reads what is not computed here, and where such a model runs
_FEATURES = ("dino_input", "global_token")


def unwrap(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The VideoFlexTok config and all its tensors, downloaded where another repository has VidTok's; other checkpoints
    come back as they are.

    Raises:
        ConfigError: an encoder over DINO features, or a field is missing.
        CheckpointError, ImportError: the VidTok weights cannot be had.
    """
    if "semantok" not in raw:
        return raw, tensors
    for name in _FEATURES:
        if field_of(raw["semantok"], name, "semantok"):
            raise ConfigError(
                f"semantok.{name} must be False, got {raw['semantok'][name]!r}: DINO features are not computed here "
                "(flexkernels.accelerate(tokenizer.vt, encoder=False) runs such a model)"
            )
    inner = field_of(raw, "videoflextok", "SemanTok's config")
    if "hub_vae" in raw and not any(key.startswith(checkpoint.CODEC_PREFIX) for key in tensors):
        tensors = tensors | _codec(raw["hub_vae"])
    return {"sampler": SAMPLER} | inner, tensors


def _codec(source: dict[str, str | None]) -> dict[str, torch.Tensor]:
    repository, revision = field_of(source, "repo", "hub_vae"), source.get("revision")
    _, tensors, _ = checkpoint.read(f"{repository}@{revision}" if revision else repository)
    return {key: value for key, value in tensors.items() if key.startswith(checkpoint.CODEC_PREFIX)}

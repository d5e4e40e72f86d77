"""Decoder: rows of tokens to rows of video, clips of one chunk in packed calls."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..fingerprint import check_tokens
from ..stills import hold, repeats
from ..tokenizer import Tokenizer
from ..tokens import VideoTokens
from ..video import to_uint8
from .encoder import Model
from .rows import Batch, Row, like, rows_of, tokens_of


@dataclass(frozen=True)
class _Clip:
    """A clip of one chunk: ids ``[t, k]`` and noise ``[C, t, h, w]`` of its latent frames up to the last moving one."""

    tokens: VideoTokens
    still: list[bool]
    ids: torch.Tensor
    noise: torch.Tensor


class Decoder:
    """A callable over batches of rows as :class:`vft.data.Encoder` makes them; adds ``video``, uint8 ``[T, H, W, 3]``.

    A row that has an ``error``, or whose tokens are of another model (its ``fingerprint`` or ``levels``), gets an empty
    video and the reason in ``error``. Clips of one chunk share packed calls, longer ones are decoded one by one, chunk
    after chunk. The noise of a clip follows from ``seed`` alone, so it does not depend on its batch.

    Args:
        model, dtype, device: see :class:`vft.data.Encoder`.
        keep: registers used of each latent frame (default: all that the row has).
        packed: clips in one call.
        sampler: ``steps``, ``guidance``, ``solver``, ``shift``, ``seed`` of :meth:`vft.Tokenizer.decode_stream`.
    """

    def __init__(
        self, model: str | os.PathLike | Tokenizer = "tiny", *, keep: int | None = None,
        dtype: str | torch.dtype = torch.float32, device: str | None = None, packed: int = 8, **sampler,
    ) -> None:  # fmt: skip
        if packed < 1:
            raise ValueError(f"packed must be at least 1, got {packed}")
        unknown = sampler.keys() - {"steps", "guidance", "solver", "shift", "seed"}
        if unknown:
            raise TypeError(f"sampler must be steps, guidance, solver, shift or seed, got {', '.join(sorted(unknown))}")
        self.model, self.keep, self.packed, self.sampler = Model(model, dtype, device), keep, packed, sampler

    def __call__(self, batch: Batch) -> Any:
        rows = rows_of(batch)
        tokenizer = self.model.load()
        if self.keep is not None and not 0 <= self.keep <= tokenizer.registers:
            raise ValueError(f"keep must be between 0 and {tokenizer.registers}, got {self.keep}")
        options = dict(self.sampler)
        seed, short = options.pop("seed", 0), []
        for row in rows:
            row.setdefault("error", None)
            row["video"] = np.zeros((0, 0, 0, 3), np.uint8)
            if row["error"] is None:
                try:
                    tokens = self._tokens(row, tokenizer)
                    if tokens.latent_frames > 1 + (tokenizer.config.chunk_size - 1) // tokenizer.codec.temporal_stride:
                        parts = tokenizer.decode_stream(tokens, keep=self.keep, **self.sampler)
                        row["video"] = np.concatenate([to_uint8(part).cpu().numpy() for part in parts])
                    else:
                        short.append((row, self._prepare(tokenizer, tokens, seed)))
                except (ValueError, TypeError) as error:
                    row["error"] = " ".join(str(error).split())
        for start in range(0, len(short), self.packed):
            group = short[start : start + self.packed]
            videos = self._decode(tokenizer, [clip for _, clip in group], options)
            for (row, _), video in zip(group, videos, strict=True):
                row["video"] = video
        return like(batch, rows)

    def _tokens(self, row: Row, tokenizer: Tokenizer) -> VideoTokens:
        tokens = tokens_of(row)
        check_tokens(tokens, tokenizer)
        if tokens.levels != tokenizer.config.levels or tokens.registers > tokenizer.registers:
            raise ValueError(
                f"ids must be of levels {list(tokenizer.config.levels)} and at most {tokenizer.registers} registers, "
                f"got {list(tokens.levels)} and {tokens.registers}"
            )
        held = 1 + (tokens.latent_frames - 1) * tokenizer.codec.temporal_stride
        if tokens.frames > held:
            raise ValueError(f"frames must be at most {held}, what the ids hold, got {tokens.frames}")
        return tokens

    @staticmethod
    def _prepare(tokenizer: Tokenizer, tokens: VideoTokens, seed: int) -> _Clip:
        stride = tokenizer.codec.temporal_stride
        shape = tokenizer.codec.latent_shape(1 + (tokens.latent_frames - 1) * stride, *tokenizer.frame_size(tokens))
        still = repeats(tokens.ids).tolist()
        # latent frames at the end that repeat what is shown need no decoding
        moving = len(still) - still[::-1].index(False)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[:, :moving]
        return _Clip(tokens, still, tokens.ids[:moving], noise.to(tokenizer.device))

    def _decode(self, tokenizer: Tokenizer, clips: list[_Clip], options: dict) -> list[np.ndarray]:
        """Clips of one chunk in one packed call -> what decode_stream gives of each, uint8 [frames, H, W, 3]."""
        ids, noise = [clip.ids for clip in clips], [clip.noise for clip in clips]
        videos = []
        for clip, z in zip(clips, tokenizer.decode_latents(ids, self.keep, noise=noise, **options), strict=True):
            video = hold(tokenizer.codec.decode(z[None]).clamp(-1, 1), clip.still, tokenizer.codec.temporal_stride)
            videos.append(to_uint8(video[:, :, : clip.tokens.frames]))
        return [video.cpu().numpy() for video in videos]

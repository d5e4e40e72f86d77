"""``vft generate``: tokens from the generator, then .vft files, or a grid video and a contact sheet at several k."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from vft import progress
from vft.files import check_new, check_output, replacing
from vft.tokens import VideoTokens
from vft.video import contact_sheet, to_uint8, write_video

KEEPS = (1, 4, 16, 64)
# samples with rows of their own in the contact sheet
SHEET_SAMPLES = 4
DEFAULT_SIZE = 256
# letters of a caption in a picture's labels
LABEL = 32


def tokens(generator, tokenizer, *condition, fps: float, size: int | None = None, **options) -> list[VideoTokens]:
    """Generated :class:`VideoTokens`, one a row; condition and options go to ``generator.stream``.

    Raises:
        ValueError: the two models do not fit, or an option is out of range.
    """
    levels = tokenizer.config.levels
    if generator.config.vocab != math.prod(levels):
        raise ValueError(f"the generator has {generator.config.vocab} ids, the tokenizer {math.prod(levels)}")
    if generator.config.fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"the generator's tokens are those of a tokenizer of fingerprint {generator.config.fingerprint}, got "
            f"{tokenizer.name!r} of {tokenizer.fingerprint}"
        )
    frames, count = options.setdefault("frames", 5), options.get("tokens_per_frame")
    if count is None:
        longest = max(frames, generator.config.trained_frames)
        count = max(1, min(tokenizer.registers, generator.config.seq_len // longest))
    if count > tokenizer.registers:
        raise ValueError(f"tokens per frame must be at most the tokenizer's {tokenizer.registers}, got {count}")
    stream = generator.stream(*condition, **options | {"tokens_per_frame": count})
    with progress.bar(desc="tokens", unit="level", total=count) as bar:
        for ids in stream:
            bar.update(ids.shape[-1] - bar.n)
    frames = 1 + (frames - 1) * tokenizer.codec.temporal_stride
    size = tokenizer.size or size or DEFAULT_SIZE
    chunk, fingerprint = tokenizer.config.chunk_size, tokenizer.fingerprint
    return [VideoTokens(row, fps, frames, size, size, tokenizer.name, levels, chunk, fingerprint) for row in ids.cpu()]


def token_paths(path: str, count: int, inputs: Sequence[str | None] = ()) -> list[Path]:
    """``a.vft``, or for several ``a-0.vft``, ``a-1.vft``, ..., which must not exist.

    Raises ValueError or OSError where they cannot be written.
    """
    target = Path(path)
    if target.suffix != ".vft":
        raise ValueError(f"output {path!r} must end in .vft")
    if count == 1:
        check_output(target, inputs)
        return [target]
    paths = [target.with_name(f"{target.stem}-{i}.vft") for i in range(count)]
    for each in paths:
        check_new(each, "give another -o, or remove it")
    return paths


def sheet_path(video: str, named: str | None, inputs: Sequence[str | None] = ()) -> Path:
    """The contact sheet's path: ``named``, or else beside the video, where it must not exist.

    Raises ValueError or OSError where it cannot be written.
    """
    if named is None:
        path = Path(video).with_suffix(".png")
        check_new(path, f"--sheet {path} replaces it")
        return path
    if Path(named).suffix != ".png":
        raise ValueError(f"sheet {named!r} must end in .png")
    check_output(named, inputs)
    return Path(named)


def show(
    tokenizer, samples: list[VideoTokens], path: str, sheet: Path, quality: int, names: Sequence[str], **sampler
) -> None:
    """Writes the grid video of all samples, and a picture of the first ones from more and more registers.

    ``names`` say what each sample is; ``sampler`` goes to ``tokenizer.decode``.
    """
    keeps = [k for k in KEEPS if k < samples[0].registers] + [samples[0].registers]
    jobs = [(i, k) for i in range(len(samples)) for k in keeps if i < SHEET_SAMPLES or k == keeps[-1]]
    clips = {}
    for i, k in progress.bar(jobs, desc="decode", unit="clip"):
        clips[i, k] = to_uint8(tokenizer.decode(samples[i].truncate(k), **sampler)).cpu()
    write_video(path, grid([clips[i, keeps[-1]] for i in range(len(samples))]), samples[0].fps, quality)
    rows = [(f"{names[i]}\n{in_words(k)}", clips[i, k]) for i, k in jobs if i < SHEET_SAMPLES]
    with replacing(sheet) as temporary:
        contact_sheet(rows).save(temporary, format="png")


def in_words(k: int) -> str:
    """The number of tokens, for a label of two lines."""
    return f"{k} token{'s' * (k > 1)}\na frame"


def names(condition: dict, classes: Sequence[str], count: int, caption: str | None = None) -> list[str]:
    """What each sample shows, ``zoom 1``, ``zoom 2``, ..., for pictures; ``sample`` where neither a class nor a caption
    was asked for."""
    asked = condition.get("class_id", caption and textwrap.shorten(caption, LABEL, placeholder="..."))
    if isinstance(asked, int):
        asked = classes[asked] if asked < len(classes) else f"class {asked}"
    return [f"{asked or 'sample'} {i + 1}" for i in range(count)]


def grid(clips: list[torch.Tensor]) -> torch.Tensor:
    """Clips of one shape, uint8 ``[T, H, W, 3]``, as the tiles of one nearly square video, white where none is."""
    columns = math.ceil(math.sqrt(len(clips)))
    rows = -(-len(clips) // columns)
    t, h, w, _ = clips[0].shape
    out = torch.full((t, rows * h, columns * w, 3), 255, dtype=torch.uint8)
    for i, clip in enumerate(clips):
        y, x = i // columns * h, i % columns * w
        out[:, y : y + h, x : x + w] = clip
    return out

"""What a run learns from: procedural video, clips that words name, a folder of videos, or a folder of token files.

A clip is a number in 0..clips-1 and always gives the same: which file, where in it, and its length and size follow from
(seed, number). So the position in the data is the step alone, on any number of processes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch

from flexkernels.upload import upload

from ..scan import find_videos
from ..text import load_embeddings
from ..tokens import VideoTokens
from ..video import open_video, preprocess, probe_video
from ..words import embed
from . import named, procedural, render
from .scene import Plan

PROCEDURAL, NAMED = "procedural", "named"
# encoded clips kept in memory; more are read again
CACHE_BYTES = 2 << 30
# on a GPU: those of all clips of the embedded recipe
DEVICE_CACHE_BYTES = 1 << 29
_TOKENS = ".vft"


class Shapes:
    """Frames and side of each clip, drawn from the given ones by (seed, number)."""

    def __init__(self, seed: int, frames: Sequence[int], sizes: Sequence[int]) -> None:
        self.seed, self.frames, self.sizes = seed, tuple(frames), tuple(sizes)

    def __call__(self, index: int) -> tuple[int, int]:
        rng = np.random.default_rng((self.seed, index, 1))
        return int(rng.choice(self.frames)), int(rng.choice(self.sizes))


class Procedural:
    """Rendered clips; the class is the motion family."""

    classes = procedural.FAMILIES

    def __init__(self, seed: int, shapes: Shapes, recipe: int = 1) -> None:
        self.seed, self.shapes, self.recipe, self.skipped = seed, shapes, recipe, {}

    def plan(self, index: int) -> Plan:
        frames, size = self.shapes(index)
        return procedural.plan(self.seed, index, size, frames, self.recipe)

    def pixels(self, index: int) -> torch.Tensor:
        """uint8 ``[T, H, W, 3]``."""
        return render.one(self.plan(index))

    def clip(self, index: int) -> torch.Tensor:
        return procedural.scaled(self.pixels(index))

    def label(self, index: int) -> int:
        return procedural.label(self.seed, index)

    def facts(self) -> None:
        return None


class Named:
    """Rendered clips that words name, see :mod:`vft.train.named`; the class is the motion."""

    classes = named.MOTIONS

    def __init__(self, seed: int, shapes: Shapes) -> None:
        self.seed, self.shapes, self.skipped = seed, shapes, {}

    def plan(self, index: int) -> Plan:
        frames, size = self.shapes(index)
        return named.plan(self.seed, index, size, frames)

    def pixels(self, index: int) -> torch.Tensor:
        """uint8 ``[T, H, W, 3]``."""
        return render.one(self.plan(index))

    def clip(self, index: int) -> torch.Tensor:
        return procedural.scaled(self.pixels(index))

    def label(self, index: int) -> int:
        return named.MOTIONS.index(named.facts(self.seed, index)[2])

    def captions(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Caption embeddings ``[c, d]``."""
        return [embed([named.caption(self.seed, i)])[0][0] for i in indices]

    def facts(self) -> None:
        return None


class Folder:
    """Files of one kind below a folder; those that cannot be read are left out and named in ``skipped``.

    The class of a file is the subfolder that it lies in, ``video`` for one outside all subfolders.
    Clip ``index`` is of file ``index % number``. Raises ValueError where nothing can be read.
    """

    def __init__(self, folder: str, names: list[str], examine: Callable[[Path], object]) -> None:
        self.folder, self.skipped = Path(folder), {}

        def examined(name: str):
            try:
                return examine(self.folder / name)
            # OSError too: a file may be unreadable
            except (ValueError, OSError) as error:
                self.skipped[name] = str(error)
                return None

        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            found = {
                name: fact for name, fact in zip(names, pool.map(examined, names), strict=True) if fact is not None
            }
        if not found:
            raise ValueError(
                f"{folder}: none of its {len(names)} files can be read, {next(iter(self.skipped.values()))}"
            )
        self.names, self.found = list(found), list(found.values())
        groups = [name.split("/")[0] if "/" in name else "video" for name in self.names]
        self.classes = tuple(sorted(set(groups)))
        self._labels = [self.classes.index(group) for group in groups]

    def label(self, index: int) -> int:
        return self._labels[index % len(self.names)]

    def facts(self) -> dict:
        """What must be the same when a run is resumed."""
        digest = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {"files": len(self.names), "digest": digest[:16]}


class Videos(Folder):
    """Clips from the videos of a folder, read by threads; the centred square is used, see :func:`vft.video.fit`."""

    def __init__(self, folder: str, seed: int, shapes: Shapes) -> None:
        super().__init__(folder, find_videos(folder), _duration)
        self.seed, self.shapes = seed, shapes

    def clip(self, index: int) -> torch.Tensor:
        """float32 ``[3, T, H, W]``; a file that turns out to be damaged is skipped for the next one.

        A video that is too short is filled by repeating its last frame."""
        frames, size = self.shapes(index)
        for i in range(index, index + len(self.names)):
            name, (seconds, fps) = self.names[i % len(self.names)], self.found[i % len(self.names)]
            spare = max(0.0, seconds - frames / fps)
            start = spare * np.random.default_rng((self.seed, index, 2)).random()
            try:
                return _read(self.folder / name, frames, size, start)
            except (ValueError, OSError) as error:
                self.skipped[name] = str(error)
        raise ValueError(f"{self.folder}: none of its videos can be read")


def _duration(path: Path) -> tuple[float, float]:
    """Seconds (0: the file does not say) and frames a second of a video of which a frame could be decoded."""
    info = probe_video(path)
    with open_video(path, warn=False) as video:
        next(video.frames)
        return info.seconds, video.fps


def _read(path: Path, frames: int, size: int, start: float) -> torch.Tensor:
    with open_video(path, size, start, warn=False) as video:
        pictures = list(islice(video.frames, frames))
    pictures += pictures[-1:] * (frames - len(pictures))
    return preprocess(torch.stack(pictures), size)


class Clips:
    """Clips as ``encode`` makes them, read ahead by threads or processes and kept while there is room.

    encode: a batch of pixels ``[B, 3, T, H, W]`` of one shape -> B tensors; pixels are on the CPU, or where
    :meth:`start_workers` says.
    """

    def __init__(self, encode: Callable, source: Procedural | Named | Videos) -> None:
        self.encode, self.source, self.label, self.classes = encode, source, source.label, source.classes
        self.encoded: dict[int, torch.Tensor] = {}
        self.room = CACHE_BYTES
        self._reading: dict[int, Future] = {}
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), thread_name_prefix="clips")
        self._make = source.clip
        self.device = torch.device("cpu")

    @property
    def skipped(self) -> dict[str, str]:
        return dict(self.source.skipped)

    def facts(self) -> dict | None:
        return self.source.facts()

    def captions(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Of sources that have captions."""
        return self.source.captions(indices)

    def start_workers(self, count: int, device: torch.device | None = None) -> None:
        """Lets ``count`` processes render, where clips are rendered: threads of one process hold each other up.

        From now on pixels are on ``device``; a GPU renders them itself, of choices that threads or processes draw.
        """
        rendered = isinstance(self.source, (Procedural, Named))
        if device is not None and device.type != "cpu":
            self.device, self.room = device, DEVICE_CACHE_BYTES
            self.encoded.clear()
            self._reading.clear()
            self._make = self.source.plan if rendered else self.source.clip
        elif count and rendered:
            self._make = self.source.pixels
        if count and rendered:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            _start_forkserver()
            self._pool.shutdown()
            self._pool = ProcessPoolExecutor(count, context, _start_worker)

    def close(self) -> None:
        """Ends what reads ahead."""
        self._pool.shutdown(cancel_futures=True)

    def fetch(self, indices: Sequence[int]) -> None:
        """Begins to read clips that :meth:`batch` will be asked for."""
        for i in indices:
            if i not in self.encoded and i not in self._reading:
                self._reading[i] = self._pool.submit(self._make, i)

    def batch(self, indices: Sequence[int]) -> list[torch.Tensor]:
        self.fetch(indices)
        missing = sorted(set(indices) & self._reading.keys())
        clips = {i: self._reading.pop(i).result() for i in missing}
        made = {}
        for shape in {clip.shape for clip in clips.values()}:
            alike = [i for i in missing if clips[i].shape == shape]
            made.update(zip(alike, self.encode(self._pixels([clips[i] for i in alike])), strict=True))
        result = [made[i] if i in made else self.encoded[i] for i in indices]
        for i, tensor in made.items():
            self.room -= tensor.numel() * tensor.element_size()
            if self.room > 0:
                self.encoded[i] = tensor.clone()
        return result

    def _pixels(self, clips: list) -> torch.Tensor:
        """Plans, uint8 ``[T, H, W, 3]`` or float ``[3, T, H, W]`` -> float ``[B, 3, T, H, W]`` on the device."""
        if isinstance(clips[0], Plan):
            return procedural.scaled(render.together(clips, self.device))
        (pixels,) = upload([torch.stack(clips)], self.device)
        return procedural.scaled(pixels) if pixels.dtype == torch.uint8 else pixels


def _start_forkserver() -> None:
    """Ctrl-C reaches the process that makes workers, and these, too, but the run still finishes its step."""
    # only the main thread may set a signal, which is inherited
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        forkserver.ensure_running()
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed cannot end its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


class TokenFiles(Folder):
    """The ids of the ``.vft`` files of a folder, whole in memory, ``[T, N]`` int32 each.

    ``model`` and ``fingerprint`` are those of the tokenizer; files of earlier versions state no fingerprint, and pass.
    With ``captions``, ``a.safetensors`` beside ``a.vft`` holds the embeddings of its caption, see
    :func:`vft.text.load_embeddings`.
    """

    def __init__(self, folder: str, model: str, registers: int, captions: bool = False, fingerprint: str = "") -> None:
        if not Path(folder).is_dir():
            raise OSError(f"{folder}: {'not a folder' if Path(folder).exists() else 'no such folder'}")
        names = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob(f"*{_TOKENS}"))

        def examine(path: Path):
            tokens = VideoTokens.load(path)
            if tokens.model != model or tokens.registers < registers:
                raise ValueError(
                    f"{path} must hold at least {registers} registers of the model {model!r}, "
                    f"got {tokens.registers} of {tokens.model!r}"
                )
            if fingerprint and tokens.fingerprint not in ("", fingerprint):
                raise ValueError(
                    f"{path} must hold tokens of {model!r} with the fingerprint {fingerprint}, got {tokens.fingerprint}"
                )
            return tokens.ids[:, :registers].int(), _caption(path) if captions else None

        super().__init__(folder, names, examine)

    @property
    def longest(self) -> int:
        """Most latent frames of a file."""
        return max(len(ids) for ids, _ in self.found)

    def start_workers(self, count: int, device: torch.device | None = None) -> None:
        """Nothing to render."""

    def close(self) -> None:
        """Nothing to end."""

    def fetch(self, indices: Sequence[int]) -> None:
        """Nothing to read ahead."""

    def batch(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [self.found[i % len(self.found)][0].long() for i in indices]

    def captions(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Caption embeddings ``[c, d]`` without padding."""
        return [self.found[i % len(self.found)][1] for i in indices]


def _caption(path: Path) -> torch.Tensor:
    emb, mask = load_embeddings(path.with_suffix(".safetensors"))
    if len(emb) != 1:
        raise ValueError(f"{path.with_suffix('.safetensors')} must hold one caption, got {len(emb)}")
    return (emb[0] if mask is None else emb[0][mask[0].bool()]).float()


def holds_tokens(folder: str) -> bool:
    """Whether a folder is one of token files."""
    return next(Path(folder).rglob(f"*{_TOKENS}"), None) is not None


def clips(encode: Callable, settings, frames: int, size: int) -> Clips:
    """The clips that a run's settings ask for, of ``frames`` frames and ``size`` pixels where they do not say."""
    shapes = Shapes(settings.seed, settings.frames or (frames,), settings.sizes or (size,))
    if settings.data == PROCEDURAL:
        return Clips(encode, Procedural(settings.seed, shapes, settings.recipe))
    if settings.data == NAMED:
        return Clips(encode, Named(settings.seed, shapes))
    return Clips(encode, Videos(settings.data, settings.seed, shapes))

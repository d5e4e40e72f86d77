"""The tokens of one video, and the progressive ``.vft`` file that holds them.

File layout, little endian::

    magic 4s = b"VFT\x1a" | version u16 | header length u16 | CRC-32 u32 of the 8 bytes before it and of the header
    header: JSON, UTF-8 (see ``_HEADER``)
    register 0 of every latent frame, u16 each; register 1 of every latent frame; ...; register N - 1

Every register refines the ones before it, so a file that is cut anywhere after its first register is a coarser video.
"""

import dataclasses
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vft.files import replacing
from vft.fingerprint import check_form

MAGIC = b"VFT\x1a"
VERSION = 1
MAX_CODEBOOK = 1 << 16

_START = struct.Struct("<4sHH")
_CRC = struct.Struct("<I")
# older files lack the last
_OPTIONAL = "fingerprint"
_HEADER = ("model", "shape", "fps", "frames", "height", "width", "levels", "chunk")
_MAX_INT = (1 << 31) - 1


class TokensError(ValueError):
    """A ``.vft`` file or its bytes cannot be read; the message names the file and the reason."""


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """Tokens of one video.

    Attributes:
        ids: int64 ``[T, N]``: N registers, coarse to fine, for each of T latent frames. ``0 <= id < prod(levels)``.
        fps: frames per second of the source.
        frames: true number of frames of the source; decoding returns this many.
        height, width: size of the source in pixels, before it was resized to what the model works at.
        model: name of the tokenizer that made the ids.
        levels: FSQ levels of its codebook.
        chunk: frames per chunk; neighbouring chunks share one frame, and every chunk but the first drops its first
            latent frame.
        fingerprint: of the weights and config that decide the ids, see :mod:`vft.fingerprint`; "" where not known.

    Raises:
        TypeError, ValueError: a field has the wrong type, shape or range.
    """

    ids: torch.Tensor
    fps: float
    frames: int
    height: int
    width: int
    model: str
    levels: tuple[int, ...]
    chunk: int = 17
    fingerprint: str = ""

    def __post_init__(self):
        levels = tuple(_integer(level, "levels", 2) for level in self.levels)
        if not levels:
            raise ValueError("levels must have at least one entry, got none")
        object.__setattr__(self, "levels", levels)
        for name in ("frames", "height", "width"):
            object.__setattr__(self, name, _integer(getattr(self, name), name, 1))
        object.__setattr__(self, "chunk", _integer(self.chunk, "chunk", 2))
        object.__setattr__(self, "fps", _fps(self.fps))
        if not isinstance(self.model, str):
            raise TypeError(f"model must be a str, got {type(self.model).__name__}")
        check_form(self.fingerprint)
        object.__setattr__(self, "ids", _ids(self.ids, self.codebook_size))

    @property
    def codebook_size(self) -> int:
        """Number of different ids, the product of the levels."""
        return math.prod(self.levels)

    @property
    def latent_frames(self) -> int:
        """T, the rows of ``ids``."""
        return self.ids.shape[0]

    @property
    def registers(self) -> int:
        """N, the columns of ``ids``."""
        return self.ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the tokens alone in a file, 2 bytes each."""
        return 2 * self.ids.numel()

    def truncate(self, k: int) -> "VideoTokens":
        """Keep the first ``k`` registers of every latent frame: a coarser video.

        Raises:
            ValueError: ``k`` is not between 1 and ``registers``.
        """
        if _integer(k, "k", 1) > self.registers:
            raise ValueError(f"k must be between 1 and {self.registers}, got {k}")
        return dataclasses.replace(self, ids=self.ids[:, :k])

    def to_bytes(self) -> bytes:
        """The content of a ``.vft`` file.

        Raises:
            ValueError: the codebook has more than 65,536 entries, or the header is longer than 65,535 bytes.
        """
        if self.codebook_size > MAX_CODEBOOK:
            raise ValueError(f"levels must span at most {MAX_CODEBOOK} ids to be saved, got {self.codebook_size}")
        fields = {name: getattr(self, name) for name in _HEADER if name != "shape"}
        if self.fingerprint:
            fields[_OPTIONAL] = self.fingerprint
        header = json.dumps({"shape": list(self.ids.shape), **fields}, separators=(",", ":")).encode()
        if len(header) > 0xFFFF:
            raise ValueError(f"header must be at most 65535 bytes, got {len(header)}: model or levels is too long")
        start = _START.pack(MAGIC, VERSION, len(header))
        body = np.ascontiguousarray(self.ids.cpu().numpy().T).astype("<u2")
        return start + _CRC.pack(zlib.crc32(start + header)) + header + body.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokens") -> "VideoTokens":
        """Read tokens from the content of a ``.vft`` file, or from any prefix of it.

        A register that is not complete over all latent frames is left out, with all after it. ``name`` stands in
        error messages.

        Raises:
            TokensError: not a ``.vft`` file, a damaged header, or not one complete register.
        """
        try:
            return _parse(data)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise TokensError(f"{name}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write a ``.vft`` file; an existing file is replaced, and nothing is left behind on an error.

        Raises:
            ValueError: see :meth:`to_bytes`.
            OSError: the file cannot be written.
        """
        data = self.to_bytes()
        with replacing(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VideoTokens":
        """Read a ``.vft`` file, complete or cut; see :meth:`from_bytes`.

        Raises:
            TokensError: not a ``.vft`` file, a damaged header, or not one complete register.
            OSError: the file cannot be read.
        """
        return cls.from_bytes(Path(path).read_bytes(), name=os.fspath(path))


def _parse(data: bytes) -> VideoTokens:
    header, body = _read_header(data)
    shape = header.pop("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"shape must be [T, N], got {shape!r}")
    rows, registers = (_integer(n, "shape", 1) for n in shape)
    complete = len(body) // (2 * rows)
    if complete == 0:
        raise ValueError(f"the first register is not complete: {2 * rows} bytes expected, {len(body)} found")
    if len(body) > 2 * rows * registers:
        raise ValueError(f"{len(body) - 2 * rows * registers} surplus bytes after the last register")
    ids = np.frombuffer(body, "<u2", complete * rows).reshape(complete, rows).T
    return VideoTokens(ids=torch.from_numpy(ids.astype(np.int64)), **header)


def _read_header(data: bytes) -> tuple[dict, bytes]:
    first = _START.size + _CRC.size
    if not data:
        raise ValueError("the file is empty")
    if data[:4] != MAGIC[: len(data)]:
        raise ValueError("not a .vft file")
    if len(data) < first:
        raise ValueError("the header is not complete")
    _, version, length = _START.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"version must be {VERSION}, got {version}")
    if len(data) < first + length:
        raise ValueError("the header is not complete")
    text = data[first : first + length]
    if zlib.crc32(data[: _START.size] + text) != _CRC.unpack_from(data, _START.size)[0]:
        raise ValueError("the header is damaged (its checksum is wrong)")
    header = json.loads(text)
    if not isinstance(header, dict) or set(header) - {_OPTIONAL} != set(_HEADER):
        raise ValueError(f"the header must have the keys {', '.join(_HEADER)}")
    if not isinstance(header["levels"], list):
        raise ValueError(f"levels must be a list, got {header['levels']!r}")
    return header, data[first + length :]


def _integer(value, name: str, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not smallest <= value <= _MAX_INT:
        raise ValueError(f"{name} must be between {smallest} and {_MAX_INT}, got {value}")
    return int(value)


def _fps(value) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"fps must be a number, got {type(value).__name__}")
    fps = float(value)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be finite and positive, got {fps}")
    return fps


def _ids(ids: torch.Tensor, codebook: int) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"ids must have shape [T, N] with T, N >= 1, got {list(ids.shape)}")
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= codebook:
        raise ValueError(f"ids must be in [0, {codebook}), got {low if low < 0 else high}")
    return ids.to(torch.int64)

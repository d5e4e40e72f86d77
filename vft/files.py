"""Output files that are either complete or not there: written beside the target, then renamed."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_output(path: str | os.PathLike, inputs: Iterable[str | os.PathLike | None] = ()) -> Path:
    """Return the real path that an output goes to, or raise before any work is done.

    An existing regular file is allowed: it is replaced. A symbolic link is followed, so the link stays.

    Raises:
        OSError: the folder is missing or not writable, or ``path`` is a folder, a device, a pipe, ``-`` or one of the
            ``inputs``.
    """
    if os.fspath(path) == "-":
        raise OSError("output '-' must be a file: this is not written to standard output")
    target = Path(os.path.realpath(path))
    if any(given is not None and os.path.realpath(given) == str(target) for given in inputs):
        raise OSError(f"output {str(path)!r} must be another file than the input")
    if target.exists() and not target.is_file():
        raise OSError(f"output {str(path)!r} must be a regular file, got a {'folder' if target.is_dir() else 'device'}")
    if not target.parent.is_dir():
        raise OSError(f"output folder {str(target.parent)!r} does not exist")
    probe = _beside(target)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"output {str(path)!r} is not writable: {error.strerror}") from error
    probe.unlink()
    return target


def check_folder(path: str | os.PathLike) -> Path:
    """The folder that outputs go to, which need not exist. Raises OSError for ``-`` and for a file."""
    if os.fspath(path) == "-":
        raise OSError("output '-' must be a folder: this is not written to standard output")
    if os.path.exists(path) and not os.path.isdir(path):
        raise OSError(f"output {str(path)!r} must be a folder, got a file")
    return Path(path)


def check_new(path: str | os.PathLike, instead: str) -> Path:
    """:func:`check_output` of a file that the user has not named: one that exists is not replaced.

    Raises:
        OSError: also where it exists; the message ends with what to do ``instead``.
    """
    if os.path.lexists(path):
        raise OSError(f"output {str(path)!r} exists and was not named: {instead}")
    return check_output(path)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it onto ``path`` at the end, remove it on any error."""
    target = check_output(path)
    temporary = _beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _beside(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(6)}.tmp")

"""Output files that are either complete or not there: written beside the target, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_output(path: str | os.PathLike) -> Path:
    """Return the real path that an output goes to, or raise before any work is done.

    An existing regular file is allowed: it is replaced. A symbolic link is followed, so the link stays.

    Raises:
        OSError: the folder is missing or not writable, or ``path`` is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path))
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

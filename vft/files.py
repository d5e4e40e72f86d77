"""Output files that are either complete or not there: written beside the target, then renamed. One writer a folder."""

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    # not on Windows, where two writers are not noticed
    fcntl = None  # type: ignore[assignment]


# names of _beside
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")


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
    probe.unlink(missing_ok=True)
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
def only_writer(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Keeps other runs from writing into ``folder``; the system lets go when the process ends, however it does.

    The processes of one run share ``.lock``, which a run of a single process has for itself, and each has its own
    ``.lock.<rank>``. The files stay, empty. A run of a single process removes what a killed one has left half-written,
    but not from a folder where any process is writing through :func:`replacing`.

    Raises OSError where another run writes there.
    """
    # whether no other run can be writing here
    alone = world_size == 1 and fcntl is not None
    with ExitStack() as held:
        for name, shared in ((".lock", world_size > 1), (f".lock.{rank}", False)):
            file = held.enter_context(open(folder / name, "a"))
            if fcntl is not None:
                try:
                    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise OSError(
                        f"output {str(folder)!r} is being written by another run: wait until it ends, or give another "
                        "folder"
                    ) from error
                except OSError:
                    # a file system without locks
                    alone = False
        if alone:
            _tidy(folder)
        yield


def _tidy(folder: Path) -> None:
    """Removes temporary files below ``folder`` that nobody is writing."""
    left = [path for path in folder.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name) and path.is_file()]
    for parent in {path.parent for path in left}:
        with _locked(parent, shared=False) as unused:
            for path in left:
                if unused and path.parent == parent:
                    path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, shared: bool) -> Iterator[bool]:
    """A lock of a folder itself, and whether it was given: those who write there share it. Nobody waits for it."""
    with ExitStack() as held:
        given = fcntl is not None
        if given:
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError:
                # it cannot be read, a file system without locks, or somebody is writing there
                given = False
        yield given


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it onto ``path`` at the end, remove it on any error."""
    target = check_output(path)
    temporary = _beside(target)
    with _locked(target.parent, shared=True):
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def _beside(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(6)}.tmp")

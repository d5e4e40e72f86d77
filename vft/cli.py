"""The ``vft`` command; each of its commands is a module of :mod:`vft.commands`.

Bad input ends with exit code 2 and one line on stderr; outputs appear complete or not at all, and only those that the
user named replace a file. A folder of which some videos failed ends with exit code 1.
"""

import argparse
import contextlib
import importlib
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec

from .commands import options

COMMANDS = (
    "encode", "decode", "reconstruct", "generate", "view", "serve", "demo", "eval", "bench", "info", "train",
    "completion",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vft: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own arguments) and return its exit code."""
    try:
        args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        with _terminable():
            code = _run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("vft: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        return 143
    except BrokenPipeError:
        # the reader of our output has gone; keep Python from writing to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"vft: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int | None:
    import torch

    import flexkernels

    from .reading import shown_warnings

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with shown_warnings(), flexkernels.backend(args.backend) if args.backend else contextlib.nullcontext():
        return args.run(args)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that unfinished files are removed."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def stop(*_):
        raise _Terminated

    # only the main thread may set a signal
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="vft", description="Tokenize video, and make video from tokens.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vft {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"vft.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        if argv[:1] == [name]:
            _fill(command, module, argv[1:])
    return parser


def parser_of(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of one command alone, given the words that begin with its name."""
    parser = _Parser(prog=f"vft {argv[0]}")
    _fill(parser, importlib.import_module(f"vft.commands.{argv[0]}"), argv[1:])
    return parser


def _fill(parser: argparse.ArgumentParser, module, words: list[str]) -> None:
    parser.set_defaults(run=module.run, words=words)
    module.add_arguments(parser)
    options.add_common(parser)


def _version() -> str:
    """flexkernels' version from its file: importing the package would import torch."""
    (folder,) = find_spec("flexkernels").submodule_search_locations
    return runpy.run_path(os.path.join(folder, "version.py"))["__version__"]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())

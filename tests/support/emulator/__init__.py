"""Runs csrc/cuda/*.cu on the CPU: g++ compiles the kernels, a runtime of fibers runs their threads and checks them.

README.md says what is checked and how to run a kernel of one's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flexkernels import library

NAMESPACE = "flexkernels_emulated"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = Path(tempfile.gettempdir()) / f"flexkernels-emulator-{os.getuid()}"
SOURCES = (ROOT / "csrc" / "sources.txt").read_text().split()
# csrc/ops, whose CUDA form takes CPU tensors with FLEXKERNELS_EMULATOR; the gradient of attention and convolutions have
# no CUDA kernels
OPS = [
    name
    for name in SOURCES
    if name.startswith("ops/")
    and "FLEXKERNELS_OPS(m) {" in (ROOT / "csrc" / name).read_text()
    and not name.startswith(("ops/attention_backward", "ops/conv"))
]
RUNTIME = [HERE / name for name in ("runtime.cpp", "memory.cpp", "warp.cpp")]

FLAGS = ["-std=c++17", "-fPIC", "-g1", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# the hooks of the thread sanitizer are the runtime's (no libtsan is linked); products and sums are contracted as nvcc
# does; whole vectors stay whole loads, so that their alignment is seen
KERNEL_FLAGS = [
    *("-x", "c++", "-O1", "-mfma", "-ffp-contract=fast", "-fexpensive-optimizations"),
    *("-fno-tree-sra", "-fno-toplevel-reorder", "-fno-threadsafe-statics"),
    *("-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"),
    *("-D__CUDACC__", "-D__CUDA_ARCH__=900", "-DFLEXKERNELS_EMULATOR", f"-I{HERE / 'include'}"),
]


def unavailable() -> str | None:
    """Why the emulator cannot run here, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or " fma " not in Path("/proc/cpuinfo").read_text():
        return "fibers are written for x86-64 with fused multiply-adds"
    missing = [tool for tool in ("g++", "addr2line", "readelf") if shutil.which(tool) is None]
    return f"{missing[0]} is missing" if missing else None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def _included(source: Path) -> frozenset[Path]:
    """The files that a source includes by a relative path, and those that they do."""
    names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.M)
    found = {path for name in names if (path := (source.parent / name).resolve()).exists()}
    return frozenset(found).union(*map(_included, found))


def _content(source: Path) -> bytes:
    """All that the emulator's object of a source is made of, but compilers and torch."""
    found = {source, *_included(source), *(HERE / "include").glob("*.h"), HERE / "runtime.h"}
    return b"\0".join(path.read_bytes() for path in sorted(found))


def _make(path: Path, command: list[str]) -> None:
    """Runs a command that makes a file, once: of several processes the others wait for it."""
    with open(path.with_suffix(path.suffix + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(f".partial{path.suffix}")
            _run([*command, "-o", str(partial)])
            partial.replace(path)


def _object(source: Path, flags: list[str]) -> Path:
    """The compiled source; kept under its content, so nothing is compiled twice."""
    key = hashlib.sha256(_content(source) + " ".join([*FLAGS, *flags, str(source)]).encode())
    path = CACHE / f"{source.stem}-{key.hexdigest()[:20]}.o"
    _make(path, ["g++", *FLAGS, *flags, "-c", str(source)])
    return path


def build(name: str, kernels: list[Path], host: dict[Path, list[str]] | None = None, libraries: list[str] = ()) -> Path:
    """An object of these .cu files, of host sources with flags of their own, and of the runtime."""
    CACHE.mkdir(exist_ok=True)
    jobs = [(source, KERNEL_FLAGS) for source in kernels] + [(source, ["-O2"]) for source in RUNTIME]
    jobs += list((host or {}).items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    link = ["-shared", "-Wl,--wrap=__tls_get_addr", "-Wl,-Bsymbolic", *map(str, objects), *libraries]
    key = hashlib.sha256(" ".join(link).encode()).hexdigest()[:20]
    path = CACHE / f"{name}-{key}.so"
    _make(path, ["g++", *link])
    return path


def shared_variables(path: Path) -> list[tuple[int, int, str]]:
    """(offset, bytes, name) of every __shared__ variable of an object."""
    found = []
    for line in _run(["readelf", "--syms", "--wide", "--demangle", str(path)]).splitlines():
        entry = line.split(None, 7)
        if len(entry) == 8 and entry[3] == "TLS" and entry[6] != "UND" and "emu_gap" not in entry[7]:
            found.append((int(entry[1], 16), int(entry[2], 0), entry[7].split("::")[-1]))
    return found


def build_ops() -> Path:
    """Every CUDA kernel with the C++ ops that launch them, registered for CPU tensors as flexkernels_emulated."""
    torch_folder = Path(torch.__file__).parent
    torch_headers = ["-O1", "-isystem", str(torch_folder / "include")]
    device = ["-DFLEXKERNELS_CUDA", "-DFLEXKERNELS_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    host = {ROOT / "csrc" / name: [*torch_headers, *device] for name in OPS}
    host[HERE / "allocator.cpp"] = [*torch_headers, "-std=c++20"]
    kernels = [ROOT / "csrc" / name for name in SOURCES if name.startswith("cuda/")]
    return build("ops", kernels, host, [str(torch_folder / "lib" / f"lib{name}.so") for name in ("c10", "torch_cpu")])


@functools.cache
def load_ops() -> Library:
    """The object of `build_ops`; all tensors made from now on are known to it."""
    space = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in (*library.OPS.values(), *library.QUERIES.values()):
        space.define(op.name + op.schema)
    loaded = Library(build_ops())
    loaded.space = space
    loaded.emu_track_tensors()
    # tables that were made before are not known
    for name, module in list(sys.modules.items()):
        if name.startswith("flexkernels"):
            for value in vars(module).values():
                getattr(value, "cache_clear", int)()
    return loaded


def _tensors(value):
    """Those that a value holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


@contextlib.contextmanager
def emulated_ops(made_before=()):
    """The backend "cuda" serves CPU tensors, in the emulator. made_before: what holds tensors older than `load_ops`."""
    loaded = load_ops()
    for tensor in _tensors(made_before):
        storage = tensor.untyped_storage()
        loaded.region(storage.data_ptr(), storage.nbytes(), "a tensor")
    before, library.emulated = library.emulated, NAMESPACE
    try:
        yield
    finally:
        library.emulated = before


class Library(ctypes.CDLL):
    """A built object: its functions, and what tests say about the memory they hand to kernels."""

    def __init__(self, path: Path):
        super().__init__(str(path), mode=ctypes.RTLD_LOCAL)
        self.emu_unwritten.restype = ctypes.c_char_p
        for offset, size, name in set(shared_variables(path)):
            self.emu_variable(ctypes.c_size_t(offset), ctypes.c_size_t(size), name.encode())

    def seed(self, seed: int) -> None:
        """Another order of warps and blocks."""
        self.emu_seed(ctypes.c_uint64(seed))

    def late(self, blocks: int) -> None:
        """So many blocks at a time, which change, stand still as long as the others get on."""
        self.emu_late(ctypes.c_uint(blocks))

    def region(self, address: int, size: int, name: str, output: bool = False) -> None:
        self.emu_region(ctypes.c_void_p(address), ctypes.c_size_t(size), name.encode(), int(output))

    def allocation(self, tensor: torch.Tensor, name: str, output: bool = False) -> int:
        """Tells the emulator about a contiguous tensor; its address. Of an output it keeps what was written."""
        self.region(tensor.data_ptr(), tensor.nbytes, name, output)
        return tensor.data_ptr()

    def unwritten(self, tensor: torch.Tensor) -> str | None:
        """What of an output no kernel wrote."""
        text = self.emu_unwritten(ctypes.c_void_p(tensor.data_ptr()))
        return text.decode() if text else None

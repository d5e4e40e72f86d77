"""Runs csrc/cuda/*.cu on the CPU: g++ compiles the kernels, a runtime of fibers runs their threads and checks them.

README.md says what is checked and how to run a kernel of one's own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = Path(tempfile.gettempdir()) / f"flexkernels-emulator-{os.getuid()}"
RUNTIME = [HERE / name for name in ("runtime.cpp", "memory.cpp", "warp.cpp")]

FLAGS = ["-std=c++17", "-fPIC", "-g1", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# the hooks of the thread sanitizer are the runtime's (no libtsan is linked); whole vectors stay whole loads, so that
# their alignment is seen
KERNEL_FLAGS = [
    *("-x", "c++", "-O1", "-ffp-contract=off", "-fno-tree-sra", "-fno-toplevel-reorder", "-fno-threadsafe-statics"),
    *("-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"),
    *("-D__CUDACC__", "-D__CUDA_ARCH__=900", "-DFLEXKERNELS_EMULATOR", f"-I{HERE / 'include'}"),
]


def unavailable() -> str | None:
    """Why the emulator cannot run here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "fibers are written for x86-64"
    missing = [tool for tool in ("g++", "addr2line", "readelf") if shutil.which(tool) is None]
    return f"{missing[0]} is missing" if missing else None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _headers() -> bytes:
    found = [*(HERE / "include").glob("*.h"), HERE / "runtime.h", *(ROOT / "csrc").rglob("*.h")]
    return b"".join(path.read_bytes() for path in sorted(found))


def _object(source: Path, flags: list[str], headers: bytes) -> Path:
    """The compiled source; kept under its content, so nothing is compiled twice."""
    key = hashlib.sha256(b"\0".join([source.read_bytes(), headers, " ".join([*flags, str(source)]).encode()]))
    path = CACHE / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.o")
        _run(["g++", *FLAGS, *flags, "-c", str(source), "-o", str(partial)])
        partial.replace(path)
    return path


def build(name: str, kernels: list[Path], host: list[Path] = (), host_flags: list[str] = ()) -> Path:
    """An object of these .cu files, host sources and the runtime."""
    CACHE.mkdir(exist_ok=True)
    headers = _headers()
    jobs = [(source, ["-O2"]) for source in RUNTIME]
    jobs += [(source, KERNEL_FLAGS) for source in kernels] + [(source, ["-O1", *host_flags]) for source in host]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job, headers), jobs))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
    path = CACHE / f"{name}-{key}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.so")
        wrap = ["-Wl,--wrap=__tls_get_addr", "-Wl,-Bsymbolic"]
        _run(["g++", "-shared", *wrap, *map(str, objects), "-o", str(partial), "-ldl"])
        partial.replace(path)
    return path


def shared_variables(path: Path) -> list[tuple[int, int, str]]:
    """(offset, bytes, name) of every __shared__ variable of an object."""
    found = []
    for line in _run(["readelf", "--syms", "--wide", "--demangle", str(path)]).splitlines():
        entry = line.split(None, 7)
        if len(entry) == 8 and entry[3] == "TLS" and entry[6] != "UND" and "emu_gap" not in entry[7]:
            found.append((int(entry[1], 16), int(entry[2], 0), entry[7].split("::")[-1]))
    return found


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

    def allocation(self, tensor, name: str, output: bool = False) -> int:
        """Tells the emulator about a tensor; its address."""
        data = ctypes.c_void_p(tensor.data_ptr())
        self.emu_region(data, ctypes.c_size_t(tensor.numel() * tensor.element_size()), name.encode(), int(output))
        return tensor.data_ptr()

    def unwritten(self, tensor) -> str | None:
        """What of an output no kernel wrote."""
        text = self.emu_unwritten(ctypes.c_void_p(tensor.data_ptr()))
        return text.decode() if text else None

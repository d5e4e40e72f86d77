"""Builds the two native objects with CMake; everything declarative is in pyproject.toml.

FLEXKERNELS_BUILD     auto (default): what the machine can build; cpu; cuda: fail where it cannot; off: pure Python
TORCH_CUDA_ARCH_LIST  CUDA architectures as torch spells them, e.g. "8.0;9.0a;10.0+PTX"
MAX_JOBS              parallel compile jobs
"""

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = (ROOT / "csrc" / "sources.txt").read_text().split()
MODES = ("auto", "cpu", "cuda", "off")
# the kernels are tuned for these; PTX of the newest one that nvcc knows covers later GPUs
CUDA_ARCHS = ("80", "90")
MIN_TORCH = (2, 10)


def build_mode():
    mode = os.environ.get("FLEXKERNELS_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"FLEXKERNELS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def site_folders():
    """Where the environment being installed into keeps its packages, also when build isolation hides them."""
    yield sysconfig.get_path("purelib")
    yield sysconfig.get_path("platlib")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(name):
            yield os.path.join(os.environ[name], "lib", version, "site-packages")
    yield site.getusersitepackages()
    yield from site.getsitepackages()
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    yield sysconfig.get_path("purelib", vars=base)


def find_torch():
    """(folder of the torch package, version string), or None."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(folder) / "torch" for folder in site_folders()]
    for folder in folders:
        if (folder / "version.py").is_file() and (folder / "lib" / "libtorch_cpu.so").exists():
            return folder, re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())[1]
    return None


def require_torch():
    found = find_torch()
    hint = "run `pip install 'torch>=2.10'` first, or set FLEXKERNELS_BUILD=off to install without native kernels"
    if found is None:
        raise SystemExit(f"flexkernels compiles against PyTorch, and this environment has none: {hint}")
    folder, version = found
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise SystemExit(f"flexkernels needs torch 2.10 or newer, found {version} in {folder}: {hint}")
    return folder


def find_compiler():
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_nvcc():
    names = [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    names[1:1] = [os.path.join(home, "bin", "nvcc") for home in homes]
    return next((shutil.which(name) for name in names if name and shutil.which(name)), None)


def cmake_archs(nvcc):
    """CMake's architecture list, from TORCH_CUDA_ARCH_LIST or from what this nvcc can generate."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    archs = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0, 9.0a or 10.0+PTX, got {entry!r}")
        name = match[1] + match[2] + match[3]
        archs += [f"{name}-real"] + [f"{name}-virtual"] * bool(match[4])
    if listed:
        return archs
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
    if not wanted:
        raise SystemExit(f"{nvcc} generates code for none of sm_{', sm_'.join(CUDA_ARCHS)}: set TORCH_CUDA_ARCH_LIST")
    # of the last one PTX for later GPUs too, which costs no second compilation
    return [f"{arch}-real" for arch in wanted[:-1]] + [wanted[-1]]


class BuildNative(build_ext):
    def run(self):
        mode = build_mode()
        missing = self.missing_tools()
        if missing and mode != "auto":
            raise SystemExit(f"FLEXKERNELS_BUILD={mode} needs {missing}")
        if missing:
            self.warn(f"{missing} not found: installing flexkernels without native kernels (pure Python)")
            return
        nvcc = find_nvcc() if mode != "cpu" else None
        if mode == "cuda" and nvcc is None:
            raise SystemExit("FLEXKERNELS_BUILD=cuda needs nvcc: put it on PATH or set CUDA_HOME")
        if mode == "auto" and nvcc is None:
            self.warn("nvcc not found: the CUDA kernels are not built (the Triton ones need no compiler)")
        self.compile(require_torch(), nvcc)

    @staticmethod
    def missing_tools():
        if sys.platform != "linux":
            return f"Linux (this is {platform.system()})"
        if find_compiler() is None:
            return "a C++ compiler"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "Python.h (the development package of this Python)"
        return None

    def compile(self, torch_folder, nvcc):
        target = Path(self.get_ext_fullpath("flexkernels._C")).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        archs = cmake_archs(nvcc) if nvcc else []
        if not nvcc:
            # an object of an earlier build would not match this one's ops
            (target.parent / "flexkernels_cuda.so").unlink(missing_ok=True)
        for other in set(target.parent.glob("_C.*.so")) - {target}:
            # one of a single Python would be imported before this one
            other.unlink()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            f"-DFLEXKERNELS_OUTPUT={target.parent}",
            f"-DFLEXKERNELS_SUFFIX={target.name.removeprefix('_C')}",
            f"-DFLEXKERNELS_VERSION={self.distribution.get_version()}",
            f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DTORCH_ROOT={torch_folder}",
            f"-DFLEXKERNELS_CUDA_ARCHS={';'.join(archs)}",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if shutil.which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        for command in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            if subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(
                    f"the native build of flexkernels failed in `{' '.join(command[:3])} ...`: see the message above; "
                    "FLEXKERNELS_BUILD=off installs without native kernels"
                )


if __name__ == "__main__":
    # the limited API: one object, and one wheel, for every Python from here on
    native = Extension("flexkernels._C", [f"csrc/{name}" for name in SOURCES], py_limited_api=True)
    setup(
        ext_modules=[] if build_mode() == "off" else [native],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

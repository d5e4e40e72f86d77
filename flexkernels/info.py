"""What this installation can do: ``python -m flexkernels.info`` (``--json`` for machines)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import torch

from . import _native
from .version import __version__


def collect() -> dict:
    """Versions, backends (None, or why one is unavailable), CPU capability, GPUs and build flags, as plain data."""
    from .library import available_backends

    return {
        "versions": {
            "flexkernels": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "backends": available_backends(),
        "cpu": {
            "machine": platform.machine(),
            "capability": _native.C.cpu_capability() if _native.cpu_unavailable is None else None,
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "build": _native.C.build_info() if _native.C else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _lines(info: dict):
    for name, version in info["versions"].items():
        yield f"{name:12} {version or 'not installed'}"
    for name, reason in info["backends"].items():
        yield f"backend {name:10} {'available' if reason is None else f'unavailable: {reason}'}"
    cpu = info["cpu"]
    yield f"cpu          {cpu['machine']}, {cpu['capability'] or 'no native kernels'}, {cpu['threads']} threads"
    for gpu in info["gpus"]:
        yield f"gpu          {gpu['name']}, sm {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
    if not info["gpus"]:
        yield "gpu          none"
    for key, value in (info["build"] or {"native": None}).items():
        text = " ".join(value) if isinstance(value, list) else value
        yield f"build {key:12} {text or 'none'}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flexkernels.info", description=__doc__.partition(":")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args(argv).json else "\n".join(_lines(info)))


if __name__ == "__main__":
    main()

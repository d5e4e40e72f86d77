"""What is measured, one op family a file; a case is one function under `@case(name)` that makes a `Case`."""

import importlib
import pkgutil

from .case import CASES, GPU_ONLY, Case

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")


def names_for(device: str) -> list[str]:
    """The cases that are measured on a device."""
    if device == "cuda":
        # convolutions are PyTorch's there
        return [name for name in CASES if not name.startswith("causal_conv")]
    return [name for name in CASES if name not in GPU_ONLY]


__all__ = ["CASES", "GPU_ONLY", "Case", "names_for"]

"""What is measured, one op family a file; a case is one function under `@case(name)` that makes a `Case`."""

import importlib
import pkgutil

from .case import CASES, Case

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")

__all__ = ["CASES", "Case"]

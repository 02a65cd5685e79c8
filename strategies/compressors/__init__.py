"""One compressor, one file: subclassing `Compressor` in a new file of this folder is all it takes to add one."""

import importlib
import pkgutil
from typing import Any

from strategies.compressors.base import Codec, Compressor, known_compressors

__all__ = ["Codec", "Compressor", "known_compressors"]

# Import every sibling, so that subclasses are known by their short names. An import error raises: a method that
# silently vanished from the list would be worse.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    """Every method by its class name: ``from strategies.compressors import Int8``."""
    for cls in known_compressors():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

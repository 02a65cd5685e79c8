"""One compressor, one file: subclassing `Compressor` in a new file of this folder is all it takes to add one."""

import importlib
import pkgutil

from strategies.compressors.base import Codec, Compressor, known_compressors

__all__ = ["Codec", "Compressor", "known_compressors"]

# Import every sibling, so that subclasses are known by their short names. An import error raises: a method that
# silently vanished from the list would be worse.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

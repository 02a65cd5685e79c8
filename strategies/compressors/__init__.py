"""One compressor, one file: subclassing `Compressor` in a new file of this folder is all it takes to add one."""

from typing import Any

from common.variants import import_siblings, variants
from strategies.compressors.base import Codec, Compressor

__all__ = ["Codec", "Compressor", "uncompressed"]

import_siblings(__name__, __path__)


def uncompressed() -> Compressor:
    """torch's own reduction, counted and timed: what an engine takes where it must have a method and is given none."""
    from strategies.compressors.none import NoCompression

    return NoCompression()


def __getattr__(name: str) -> Any:
    """Every method by its class name: ``from strategies.compressors import Int8``."""
    for cls in variants(Compressor):
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

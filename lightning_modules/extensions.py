"""One file, one variant: subclassing a feature's base class in a new file of its folder is all it takes to add one."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

Base = TypeVar("Base")


def import_siblings(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its classes are known by their short names.

    Call it in the package's ``__init__`` with ``__name__`` and ``__path__``. An import error raises: a variant that
    silently vanished from the list would be worse.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def variants(base: type[Base]) -> list[type[Base]]:
    """All concrete subclasses of ``base``, by name."""
    found: list[type[Base]] = []
    for subclass in base.__subclasses__():
        found += ([] if inspect.isabstract(subclass) else [subclass]) + variants(subclass)
    return sorted(found, key=lambda cls: cls.__name__)

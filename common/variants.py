"""One file, one variant: subclassing a feature's base class in a new file of its folder is all it takes to add one."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any, TypeVar

Base = TypeVar("Base")


class Variant:
    """A class that records name and repeat: constructor arguments are attributes of the same name."""

    @property
    def name(self) -> str:
        """The variant's name in records and tables: its file's."""
        return type(self).__module__.rpartition(".")[2]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for records and cache names."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        """The constructor call that makes an equal variant."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"


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

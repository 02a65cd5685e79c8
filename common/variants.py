"""One file, one variant: subclassing a family's base class in a new file of its folder is all it takes to add one.

A family is a kind of exchangeable part (compressor, token scorer, saliency target, …). Its base class subclasses
`Variant`, its folder's `__init__` calls `import_siblings`, and `variants(base)` is the registry.
"""

import importlib
import inspect
import pkgutil
from abc import ABC
from collections.abc import Iterable
from typing import Any, Self, TypeVar

Base = TypeVar("Base")


class Variant(ABC):  # noqa: B024 - families add the abstract methods
    """A class that records name and repeat: constructor arguments are attributes of the same name."""

    @property
    def name(self) -> str:
        """The variant's name in records and tables: its file's, with those of variants inside."""
        inner = ", ".join(value.name for value in self.arguments().values() if isinstance(value, Variant))
        own = type(self).__module__.rpartition(".")[2]
        return f"{own}({inner})" if inner else own

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, for records and cache names; variants inside described."""
        return {name: _plain(value) for name, value in self.arguments().items()}

    def describe(self) -> dict[str, Any]:
        """Class and configuration: equal for variants that do the same."""
        return {"class": type(self).__name__, **self.config()}

    def __repr__(self) -> str:
        """The constructor call that makes an equal variant."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments().items())})"

    @classmethod
    def examples(cls) -> list[Self]:
        """Instances that the law tests of the family run: the defaults; more where an argument changes what is done."""
        return [cls()]


def _plain(value: Any) -> Any:
    if isinstance(value, Variant):
        return value.describe()
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def import_siblings(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its classes are known by their short names.

    Call it in the package's ``__init__`` with ``__name__`` and ``__path__``. An import error raises: a variant that
    silently vanished from the list would be worse.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def variants(base: type[Base]) -> list[type[Base]]:
    """All concrete subclasses of ``base`` that have been imported, each once, by name."""
    found: set[type[Base]] = set()
    waiting = base.__subclasses__()
    while waiting:
        cls = waiting.pop()
        found.add(cls)
        waiting += cls.__subclasses__()
    return sorted((cls for cls in found if not inspect.isabstract(cls)), key=lambda cls: cls.__name__)


def families() -> list[type[Variant]]:
    """The base class of every family that has been imported, by name."""
    return sorted(Variant.__subclasses__(), key=lambda cls: cls.__name__)

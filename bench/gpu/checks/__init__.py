"""Checks of a machine with GPUs: one file, one check.

A check is a module with a docstring whose first line says what it checks, ``LIMIT_S`` (seconds after which it has
failed, start of Python included), ``GPUS`` (how many it needs) and ``run(setting)``, which yields figures (see
``bench.gpu.setting.found``) and raises where something is wrong. Together those for one GPU have 12 minutes.
"""

import importlib
import pkgutil
from typing import Any


def names() -> list[str]:
    """Every check there is; what is right comes before what is fast."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(found, key=lambda name: (name.endswith("_speed"), name))


def load(name: str) -> Any:
    """The check of this name."""
    return importlib.import_module(f"{__name__}.{name}")


def says(name: str) -> str:
    """What it checks, in a line."""
    return str(load(name).__doc__).splitlines()[0].rstrip(".")

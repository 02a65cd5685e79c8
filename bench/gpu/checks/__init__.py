"""Checks of a machine with GPUs: one file, one check.

A check is a module with a docstring whose first line says what it checks, ``LIMIT_S`` (seconds after which it has
failed, start of Python included), ``GPUS`` (how many it needs) and ``run(setting)``, which yields figures (see
``bench.gpu.setting.found``) and raises where something is wrong. Together those for one GPU have 12 minutes.
"""

import importlib
import pkgutil
from typing import Any, NamedTuple


def names() -> list[str]:
    """Every check there is; what is right comes before what is fast."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(found, key=lambda name: (name.endswith("_speed"), name))


def load(name: str) -> Any:
    """The check of this name."""
    return importlib.import_module(f"{__name__}.{name}")


class Check(NamedTuple):
    """What is known of a check.

    Attributes:
        says: What it checks, in a line.
        limit_s: See above.
        gpus: How many it needs.
    """

    says: str
    limit_s: float
    gpus: int


def about(name: str) -> Check:
    """What a check says of itself; one that cannot be imported is made all the same: its record will say why."""
    try:
        module = load(name)
    except Exception:  # whatever it is, it must stop no other check
        return Check(name, 60.0, 1)
    return Check(str(module.__doc__).splitlines()[0].rstrip("."), module.LIMIT_S, module.GPUS)

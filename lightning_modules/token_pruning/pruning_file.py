"""A measured schedule and scorer in one file, and the model that they were measured on."""

import json
from pathlib import Path
from typing import Any

from common.variants import variants
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Scorer

FILE = "pruning.json"
_FORMAT = "pare-pruning"


def content(schedule: Schedule, scorer: Scorer, base: dict[str, Any], measured: dict[str, Any]) -> str:
    """The text of ``pruning.json``.

    Args:
        schedule: Where and how much.
        scorer: Which tokens.
        base: Identity of the model, see ``identity_of``.
        measured: What calibration found, for people.
    """
    parts = {"schedule": schedule.arguments(), "scorer": scorer.describe(), "measured": measured, "base": base}
    return json.dumps({"format": _FORMAT, **parts}, indent=1) + "\n"


def read(folder: str | Path) -> tuple[Scorer, Schedule, dict[str, Any]]:
    """Scorer, schedule and the identity of their model.

    Raises:
        FileNotFoundError: There is no ``pruning.json``.
        ValueError: It is cut short, or of another kind.
    """
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {path.parent}: give the folder that `calibrate` wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']!r}")
        return _scorer(found["scorer"]), Schedule(**found["schedule"]), found["base"]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path} is damaged or no calibrated pruning ({error!r}): calibrate again") from error


def _scorer(described: dict[str, Any]) -> Scorer:
    """What ``Scorer.describe`` says, made again; one inside another too."""
    arguments = {
        name: _scorer(value) if isinstance(value, dict) and "class" in value else value
        for name, value in described.items()
        if name != "class"
    }
    if arguments.get("only"):
        arguments["only"] = {int(layer): heads for layer, heads in arguments["only"].items()}
    cls = next(cls for cls in variants(Scorer) if cls.__name__ == described["class"])
    return cls(**arguments)

"""Losses measured before, by name, in a file that grows with every one of them."""

import json
from collections.abc import Mapping
from pathlib import Path

from common.files import write_text
from lightning_modules.structured_pruning.provenance import settings_hash


def read(path: Path) -> dict[str, float]:
    """What is there; a file that is not as it was written counts as none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        losses: dict[str, float] = found["losses"]
        return losses if found["hash"] == settings_hash(losses) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(path: Path, losses: Mapping[str, float]) -> None:
    """Replace the file."""
    write_text(path, json.dumps({"losses": losses, "hash": settings_hash(losses)}))

"""One scorer, one file: subclassing `Scorer` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings, variants
from lightning_modules.token_pruning.scorers.base import Context, Scorer

__all__ = ["Context", "Scorer", "known_scorers"]

import_siblings(__name__, __path__)


def known_scorers() -> list[type[Scorer]]:
    """Every scorer there is, by class name."""
    return variants(Scorer)  # type: ignore[type-abstract]

"""One saliency target, one file: subclassing ``Target`` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings, variants
from lightning_modules.token_pruning.targets.base import Target

__all__ = ["Target", "known_targets"]

import_siblings(__name__, __path__)


def known_targets() -> list[type[Target]]:
    """Every target there is, by name."""
    return variants(Target)  # type: ignore[type-abstract]

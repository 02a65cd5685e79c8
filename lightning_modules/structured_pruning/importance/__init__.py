"""One importance, one file: subclassing `Importance` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores

__all__ = ["Importance", "LayerScores"]

import_siblings(__name__, __path__)

"""One scorer, one file: subclassing `Scorer` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.token_pruning.scorers.base import Context, Scorer

__all__ = ["Context", "Scorer"]

import_siblings(__name__, __path__)

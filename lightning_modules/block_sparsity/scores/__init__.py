"""One score, one file: subclassing `Score` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.block_sparsity.scores.base import Score

__all__ = ["Score"]

import_siblings(__name__, __path__)

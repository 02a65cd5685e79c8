"""One saliency target, one file: subclassing ``Target`` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.token_pruning.targets.base import Target

__all__ = ["Target"]

import_siblings(__name__, __path__)

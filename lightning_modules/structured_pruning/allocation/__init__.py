"""One allocation, one file: subclassing `Allocation` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.structured_pruning.allocation.base import Allocation

__all__ = ["Allocation"]

import_siblings(__name__, __path__)

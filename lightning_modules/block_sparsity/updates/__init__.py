"""One weight update, one file: subclassing `Update` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.block_sparsity.updates.base import Update

__all__ = ["Update"]

import_siblings(__name__, __path__)

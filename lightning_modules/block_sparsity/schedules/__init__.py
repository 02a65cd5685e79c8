"""One schedule, one file: subclassing `Schedule` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.block_sparsity.schedules.base import Schedule

__all__ = ["Schedule"]

import_siblings(__name__, __path__)

"""One compensation, one file: subclassing `Compensation` in a new file of this folder is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.structured_pruning.compensation.base import Compensation

__all__ = ["Compensation"]

import_siblings(__name__, __path__)

"""One kind of trained scorer, one file: subclassing `Network` in a new file here is all it takes to add one."""

from common.variants import import_siblings
from lightning_modules.token_pruning.networks.base import Network

__all__ = ["Network"]

import_siblings(__name__, __path__)

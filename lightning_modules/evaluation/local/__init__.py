"""One kind of task made of the user's own files, one file: subclassing `LocalTask` in a new file is all it takes."""

from common.variants import import_siblings
from lightning_modules.evaluation.local.base import LocalTask

__all__ = ["LocalTask"]

import_siblings(__name__, __path__)

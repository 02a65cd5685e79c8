"""The features: models, their training, and their data."""

from lightning_modules import structured_pruning  # noqa: F401 - pruned models are known to transformers
from lightning_modules.data.embedded import EmbeddedDocs
from lightning_modules.data.text import TextCorpus
from lightning_modules.pretraining import Pretraining

__all__ = ["EmbeddedDocs", "Pretraining", "TextCorpus"]

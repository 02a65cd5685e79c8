"""The features: models, their training, and their data."""

from lightning_modules.data import EmbeddedDocs, TextCorpus
from lightning_modules.pretraining import Pretraining

__all__ = ["EmbeddedDocs", "Pretraining", "TextCorpus"]

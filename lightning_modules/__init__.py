"""The features: models, their training, and their data."""

from lightning_modules.data.embedded import EmbeddedDocs
from lightning_modules.data.instruct import InstructData
from lightning_modules.data.text import TextCorpus
from lightning_modules.pretraining import Pretraining
from lightning_modules.structured_pruning import LoraRecovery, StructuredPruning

__all__ = ["EmbeddedDocs", "InstructData", "LoraRecovery", "Pretraining", "StructuredPruning", "TextCorpus"]

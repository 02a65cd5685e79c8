"""The features: models, their training, and their data."""

from lightning_modules.data.embedded import EmbeddedDocs
from lightning_modules.data.instruct import InstructData
from lightning_modules.data.recall import Recall
from lightning_modules.data.text import TextCorpus
from lightning_modules.pretraining import Pretraining
from lightning_modules.token_pruning.module import TokenPruning
from lightning_modules.token_pruning.quality.module import TokenQuality
from lightning_modules.token_pruning.saliency import TokenSaliency

__all__ = [
    "EmbeddedDocs",
    "InstructData",
    "Pretraining",
    "Recall",
    "TextCorpus",
    "TokenPruning",
    "TokenQuality",
    "TokenSaliency",
]

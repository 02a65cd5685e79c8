"""The features: models, their training, and their data."""

from lightning_modules.block_sparsity import BlockSparsity
from lightning_modules.data.embedded import EmbeddedDocs
from lightning_modules.data.instruct import InstructData
from lightning_modules.data.recall import Recall
from lightning_modules.data.text import TextCorpus
from lightning_modules.evaluation import TaskEvaluation
from lightning_modules.pretraining import Pretraining
from lightning_modules.structured_pruning import LoraRecovery, StructuredPruning
from lightning_modules.token_pruning.asked_text import AskedText
from lightning_modules.token_pruning.calibration.module import TokenCalibration
from lightning_modules.token_pruning.module import TokenPruning
from lightning_modules.token_pruning.quality.module import TokenQuality
from lightning_modules.token_pruning.saliency import TokenSaliency

__all__ = [
    "AskedText",
    "BlockSparsity",
    "EmbeddedDocs",
    "InstructData",
    "LoraRecovery",
    "Pretraining",
    "Recall",
    "StructuredPruning",
    "TaskEvaluation",
    "TextCorpus",
    "TokenCalibration",
    "TokenPruning",
    "TokenQuality",
    "TokenSaliency",
]

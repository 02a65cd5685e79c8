"""Structured pruning: whole groups of heads and MLP channels go, and the model that is left loads anywhere."""

from lightning_modules.structured_pruning import per_layer_models
from lightning_modules.structured_pruning.module import StructuredPruning
from lightning_modules.structured_pruning.recovery import LoraRecovery

per_layer_models.register()

__all__ = ["LoraRecovery", "StructuredPruning"]

"""Structured pruning: whole groups of heads and MLP channels go, and the model that is left loads anywhere."""

from lightning_modules.structured_pruning import per_layer_models
from lightning_modules.structured_pruning.loading import load
from lightning_modules.structured_pruning.module import StructuredPruning

per_layer_models.register()

__all__ = ["StructuredPruning", "load"]

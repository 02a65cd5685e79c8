"""Token pruning: learn which prompt tokens matter and skip the rest during prefill."""

from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers import Scorer
from lightning_modules.token_pruning.targets import Target

__all__ = ["PromptPruner", "Schedule", "Scorer", "Target", "TokenPruner"]

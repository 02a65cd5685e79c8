"""Prompts and a pruner that several tests use."""

import torch
import torch.nn.functional as F

from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from tests.lightning_modules.token_pruning.models import tokens

AFTER, N = [1, 3], 96


def prompt_pruner(keep=0.7, scorer=None, **fields):
    return PromptPruner(
        scorer or HiddenNorm(), Schedule(**{"layers": AFTER, "keep": keep, "of": "prompt", "min_tail": 16, **fields})
    )


def padded(rows):
    """Prompts of different lengths, padded on the left, and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])


ROWS = [tokens(N, seed=1), tokens(61, seed=2), tokens(80, seed=3)]

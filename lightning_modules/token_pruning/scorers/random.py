"""Keep any tokens: the baseline that a scorer must beat."""

import torch
from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer


class Random(Scorer):
    """Uniform random scores, drawn anew at every stage of every prompt.

    Args:
        seed: Of the sequence of draws; equal seeds and prompts in equal order give equal choices on every device.
    """

    repeatable = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        drawn = torch.rand(hidden_BNH.shape[:2], generator=self._generator)
        return drawn.to(hidden_BNH.device, non_blocking=True)

"""Weights relative to their row and column, times the inputs they meet."""

import torch
from torch import Tensor

from lightning_modules.block_sparsity.inputs import Inputs
from lightning_modules.block_sparsity.scores.base import Score


class Ria(Score):
    """(|W| over the sum of its row + |W| over the sum of its column) · ‖X‖^a. RIA, Zhang et al., ICLR 2024.

    No row and no column is emptied for being small altogether. Takes a float32 copy of the matrix in memory.

    Args:
        power: a; 0.5 in the paper.
    """

    needs_inputs = True

    def __init__(self, power: float = 0.5) -> None:
        if not 0 <= power < float("inf"):
            raise ValueError(f"Ria: power must not be negative, got {power}")
        self.power = power

    def statistic(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """(1/Σ row + 1/Σ column) · ‖X‖^a, ``float32 [R, C]``."""
        sizes, tiny = weight.float().abs(), torch.finfo(torch.float32).tiny
        relative = 1 / sizes.sum(1, keepdim=True).clamp_min(tiny) + 1 / sizes.sum(0).clamp_min(tiny)
        return relative.mul_(inputs.squares.sqrt().pow(self.power))

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        return weight.float().abs().mul_(statistic)

"""What a weight update is: how the weights that stay make up for those that go.

Shape legend: R, C rows (outputs) and columns (inputs) of a matrix.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from common.variants import Variant
from lightning_modules.block_sparsity.inputs import Moments


@dataclass(frozen=True)
class Choice:
    """Weights whose mask an update may decide itself.

    Args:
        free_RC: bool; for groups, True or False for the whole of one.
        kept: How many weights of every group of neighbours in a row stay.
        of: Size of a group.
        sparsity: Instead of groups: share of all weights that are gone afterwards, those of before included.
    """

    free_RC: Tensor
    kept: int = 0
    of: int = 0
    sparsity: float = 0.0


class Update(Variant):
    """New values of the weights that a mask keeps, so that the matrix gives what it gave before.

    That is, on the calibration tokens x: least Σ ‖(W′ − W)·x‖² = Σ over rows of (w′ − w)·M·(w′ − w)ᵀ with M = Σ x xᵀ.

    Args:
        damping: Share of M's mean diagonal that is added to its diagonal: keeps W′ near W where there is little text.
    """

    def __init__(self, damping: float = 0.01) -> None:
        if not 0 < damping < float("inf"):
            raise ValueError(f"update: damping must be above 0, got {damping}")
        self.damping = damping

    @abstractmethod
    def apply(
        self, weight_RC: Tensor, keep_RC: Tensor, moments: Moments, choice: Choice | None = None
    ) -> tuple[Tensor, Tensor]:
        """The new matrix and its mask.

        Args:
            weight_RC: The matrix as it was, float32.
            keep_RC: bool, its mask.
            moments: M, of at least one token.
            choice: What the update may decide itself, if it can; the mask says what it would be otherwise.

        Returns:
            W′, float32, zero where a weight is not kept; and the mask, ``keep_RC`` unless there is a choice.

        Raises:
            ValueError: M is not finite.
        """


def relative_error(weight_RC: Tensor, was_RC: Tensor, moments: Moments) -> float:
    """Σ ‖(W′ − W)·x‖² over Σ ‖W·x‖²."""
    change = (weight_RC - was_RC).float()
    wrong = ((change @ moments.total) * change).sum(dtype=torch.float64)
    whole = ((was_RC.float() @ moments.total) * was_RC).sum(dtype=torch.float64)
    return float(wrong / whole.clamp_min(torch.finfo(torch.float32).tiny))

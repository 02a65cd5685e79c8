"""Kept weights stay as they are."""

from lightning_modules.structured_pruning.compensation.base import Compensation
from lightning_modules.structured_pruning.moments import Matrix, Moments


class Unchanged(Compensation):
    """No compensation: the pruned model is a slice of the dense one, bit by bit."""

    refits = False

    def __init__(self) -> None:
        super().__init__()

    def solve(self, matrix: Matrix, moments: Moments, setting: float | None) -> Matrix:
        """See ``Compensation.solve``."""
        return matrix

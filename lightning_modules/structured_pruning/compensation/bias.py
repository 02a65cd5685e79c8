"""The mean of what is missing, in a bias."""

from lightning_modules.structured_pruning.compensation.base import Compensation
from lightning_modules.structured_pruning.moments import Matrix, Moments


class Bias(Compensation):
    """Only an output bias changes: by the mean of what the removed parts gave (FLAP, arXiv 2312.11983).

    Args:
        folds: See ``Compensation``.
    """

    def __init__(self, folds: int = 4) -> None:
        super().__init__(folds, bias=True)

    def solve(self, matrix: Matrix, moments: Moments, setting: float | None) -> Matrix:
        """See ``Compensation.solve``."""
        return Matrix(matrix.weight, (moments.y - matrix.weight @ moments.x) / moments.weight)

"""Fast at first."""

from lightning_modules.block_sparsity.schedules.base import Curve


class CubicSchedule(Curve):
    """Fast at first and slowly in the end: after iteration i of n, 1 − (1 − i/n)³ of the way is done.

    The curve of Zhu and Gupta, arXiv 1710.01878. Arguments: see ``Curve``.
    """

    def done(self, x: float) -> float:
        """See ``Curve.done``."""
        return 1 - (1 - x) ** 3

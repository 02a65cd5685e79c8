"""The size of the weight alone."""

from torch import Tensor

from lightning_modules.block_sparsity.scores.base import Score


class Magnitude(Score):
    """|W|. Han et al., arXiv 1506.02626. No calibration."""

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        return weight.float().abs()

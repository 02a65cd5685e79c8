"""Weights times the inputs they meet."""

from torch import Tensor

from lightning_modules.block_sparsity.inputs import Inputs
from lightning_modules.block_sparsity.scores.base import Score


class Wanda(Score):
    """|W|·‖X‖: a weight matters as much as the values it multiplies. Sun et al., arXiv 2306.11695.

    ‖X‖ is the L2 norm of each input column over the calibration tokens.
    """

    needs_inputs = True

    def statistic(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """Input norms ``float32 [C]``."""
        return inputs.squares.sqrt()

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        return weight.float().abs().mul_(statistic)

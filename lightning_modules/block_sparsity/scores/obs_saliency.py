"""What losing a weight costs when the others make up for it."""

from torch import Tensor

from lightning_modules.block_sparsity.inputs import Inputs
from lightning_modules.block_sparsity.scores.base import Score


class ObsSaliency(Score):
    """|W|/√[M⁻¹]_cc, M = Σ x xᵀ damped: the root of the error that is left when one weight goes and the rest of its row
    is refitted. Optimal brain surgeon, Hassibi and Stork 1993.

    ``Wanda`` is the same with M's diagonal alone.

    Args:
        damping: Share of M's mean diagonal that is added to its diagonal.
    """

    needs_inputs = needs_moments = True

    def __init__(self, damping: float = 0.01) -> None:
        if not 0 < damping < float("inf"):
            raise ValueError(f"ObsSaliency: damping must be above 0, got {damping}")
        self.damping = damping

    def statistic(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """1/√[M⁻¹]_cc, ``float32 [C]``."""
        return inputs.moments.inverse_diagonal(self.damping).rsqrt().float()

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        return weight.float().abs().mul_(statistic)

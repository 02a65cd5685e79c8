"""How much a part's output varies: what a constant, such as a bias, cannot make up for."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.structured_pruning.importance.activation import by_parts, input_sums
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores


class Fluctuation(Importance):
    """Variance over tokens of x · ‖W column‖², with x the input of o_proj or down_proj, summed over the part.

    FLAP's score (arXiv 2312.11983), within a layer; FLAP also puts the layers' mean outputs into biases.
    """

    passes = 1.0

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        variances = {
            linear: (sums.squares / sums.tokens - (sums.values / sums.tokens).square()).clamp_min(0)
            for linear, sums in input_sums(model, batches).items()
        }
        return by_parts(model, variances)

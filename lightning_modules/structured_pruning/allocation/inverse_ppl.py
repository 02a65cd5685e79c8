"""Rates in inverse proportion to the perplexity without the layer."""

import math

from lightning_modules.structured_pruning.allocation.base import WeightedAllocation
from lightning_modules.structured_pruning.layer_damage import LayerDamage


class InversePPL(WeightedAllocation):
    """Rates ∝ 1 / PPL of the model without the layer: nearly uniform, but for layers whose loss is a collapse."""

    needs_damage = True

    def weights(self, damage: LayerDamage) -> list[float]:
        """See ``WeightedAllocation.weights``; relative to the dense model, so that exp does not overflow."""
        return [math.exp(max(damage.dense - loss, -700)) for loss in damage.without]

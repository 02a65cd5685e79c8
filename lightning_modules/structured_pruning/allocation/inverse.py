"""Rates in inverse proportion to the damage of removing the layer."""

from lightning_modules.structured_pruning.allocation.base import WeightedAllocation
from lightning_modules.structured_pruning.layer_damage import LayerDamage

_LEAST = 0.01  # of the largest damage: a layer that does no harm, or helps, has no infinite weight


class Inverse(WeightedAllocation):
    """Rates ∝ 1 / Δloss, Δloss being the rise of the loss when the layer is skipped."""

    needs_damage = True

    def weights(self, damage: LayerDamage) -> list[float]:
        """See ``WeightedAllocation.weights``."""
        rises = [loss - damage.dense for loss in damage.without]
        least = max(_LEAST * max(rises), 1e-9)
        return [1 / max(rise, least) for rise in rises]

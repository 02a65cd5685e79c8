"""Rates by the order of damages alone."""

from lightning_modules.structured_pruning.allocation.base import WeightedAllocation
from lightning_modules.structured_pruning.layer_damage import LayerDamage


class Rank(WeightedAllocation):
    """Rates that fall in equal steps from the least to the most damaging layer."""

    needs_damage = True

    def weights(self, damage: LayerDamage) -> list[float]:
        """See ``WeightedAllocation.weights``: L for the least damaging layer, 1 for the most."""
        order = sorted(range(len(damage.without)), key=lambda i: damage.without[i], reverse=True)
        places = {layer: place for place, layer in enumerate(order, 1)}
        return [float(places[i]) for i in range(len(order))]

"""The same rate in every layer."""

from lightning_modules.structured_pruning.allocation.base import WeightedAllocation
from lightning_modules.structured_pruning.layer_damage import LayerDamage


class Uniform(WeightedAllocation):
    """The same rate in every layer; needs no measurement, and the padded export wastes nothing.

    Args:
        floor: See ``Allocation``.
        cap: See ``Allocation``.
    """

    def __init__(self, floor: float = 0.0, cap: float = 1.0) -> None:
        super().__init__(floor, cap)

    def weights(self, damage: LayerDamage) -> list[float]:
        """See ``WeightedAllocation.weights``."""
        return [1.0] * len(damage.without)

"""What an allocation is: it divides a budget among the layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from common.variants import Variant
from lightning_modules.structured_pruning.budget import Removal
from lightning_modules.structured_pruning.importance.base import LayerScores
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import LayerShape

_TINY = 1e-9  # least weight of a layer, so that λ · weight can reach every rate


class Allocation(Variant, ABC):
    """Says what goes of every layer so that so many parameters go in all.

    Args:
        floor: Least share of a layer's groups and channels to remove.
        cap: Largest share of them to remove; keeps a layer that seems worthless from being emptied.

    Raises:
        ValueError: Not 0 ≤ floor ≤ cap ≤ 1.
    """

    needs_damage = False
    needs_scores = False
    rates: tuple[float, ...] = ()
    """Shares of a layer's parts that ``LayerDamage.partly`` is asked for at."""

    def __init__(self, floor: float = 0.0, cap: float = 0.7) -> None:
        if not 0 <= floor <= cap <= 1:
            raise ValueError(f"allocation: 0 ≤ floor ≤ cap ≤ 1 does not hold for floor {floor}, cap {cap}")
        self.floor, self.cap = floor, cap

    @abstractmethod
    def removals(
        self,
        shapes: Sequence[LayerShape],
        target: int,
        damage: LayerDamage | None,
        scores: Sequence[LayerScores] | None,
    ) -> list[Removal]:
        """What goes of each layer.

        Args:
            shapes: The layers.
            target: Parameters to remove from all of them.
            damage: Losses without each layer; given where ``needs_damage``.
            scores: Importances of groups and channels; given where ``needs_scores``.

        Raises:
            ValueError: Floor or cap do not allow the target; the message says what they allow.
        """

    def check_target(self, shapes: Sequence[LayerShape], target: int, removed: int = 0) -> None:
        """Refuse a target that floor and cap do not allow.

        Args:
            shapes: The layers.
            target: Parameters to remove from all of them.
            removed: Parameters that will have gone before.

        Raises:
            ValueError: See ``removals``.
        """
        prunable = sum(map(prunable_parameters, shapes)) - removed
        total = sum(s.parameters for s in shapes) - removed
        least, most = self.floor * prunable, self.cap * prunable
        # a rounding of one part in a million is not worth an error
        if not least * (1 - 1e-6) <= target <= most * (1 + 1e-6):
            bound, field = (most, "cap") if target > most else (least, "floor")
            raise ValueError(
                f"budget: removing {target:,} parameters ({target / total:.2%} of these layers) is not possible with "
                f"allocation.{field} {getattr(self, field)}; the nearest possible is {bound:,.0f} ({bound / total:.2%})"
            )


class WeightedAllocation(Allocation):
    """Rates in proportion to a weight of each layer, clipped to floor and cap.

    Within a layer, heads and channels go at the same rate.
    """

    @abstractmethod
    def weights(self, damage: LayerDamage) -> list[float]:
        """What each layer's rate is in proportion to; not negative."""

    def removals(
        self,
        shapes: Sequence[LayerShape],
        target: int,
        damage: LayerDamage | None,
        scores: Sequence[LayerScores] | None,
    ) -> list[Removal]:
        """See ``Allocation.removals``."""
        self.check_target(shapes, target)
        weights = self.weights(damage or LayerDamage(0.0, [0.0] * len(shapes)))
        sizes = [prunable_parameters(shape) for shape in shapes]
        rates = water_fill(weights, sizes, target, self.floor, self.cap)
        return [Removal(r * s.groups, r * s.channels) for r, s in zip(rates, shapes, strict=True)]


def water_fill(weights: Sequence[float], sizes: Sequence[int], target: float, floor: float, cap: float) -> list[float]:
    """Rates ``min(max(λ · weight, floor), cap)`` with the λ for which Σ rate · size is the target.

    Args:
        weights: Not negative.
        sizes: Parameters of each layer that can go.
        target: Between floor · Σ sizes and cap · Σ sizes.
        floor: Least rate.
        cap: Largest rate.
    """
    largest = max(weights)
    scaled = [max(weight / largest, _TINY) for weight in weights]

    def rates(scale: float) -> list[float]:
        return [min(max(scale * weight, floor), cap) for weight in scaled]

    low, high = 0.0, cap / min(scaled)  # at high, every rate is at the cap
    for _ in range(200):  # bisection down to the last bit
        middle = (low + high) / 2
        if sum(r * s for r, s in zip(rates(middle), sizes, strict=True)) < target:
            low = middle
        else:
            high = middle
    return rates(high)


def prunable_parameters(shape: LayerShape) -> int:
    """Parameters of all groups and channels of a layer."""
    return shape.groups * shape.group_parameters + shape.channels * shape.channel_parameters

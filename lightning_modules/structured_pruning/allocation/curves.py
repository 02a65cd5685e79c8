"""Rates by how the loss rises with each layer's."""

from collections.abc import Sequence
from itertools import pairwise

from lightning_modules.structured_pruning.allocation.base import Allocation, prunable_parameters
from lightning_modules.structured_pruning.budget import Removal
from lightning_modules.structured_pruning.importance.base import LayerScores
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import LayerShape

Point = tuple[float, float]
"""A share of a layer's parts that goes, and the model's loss then."""


class Curves(Allocation):
    """A rate for every layer so that the sum of the rises of the loss is least: one price of a parameter for all.

    The loss is measured with each layer alone cut at a few rates; between them it is taken to rise in straight lines,
    and the sum over layers for the rise of all. With ``max_ppl_ratio`` the largest budget is found whose rates, so
    tuned, keep the perplexity under a limit. Within a layer, heads and channels go at the same rate.

    Args:
        floor: See ``Allocation``.
        cap: See ``Allocation``.
        rates: What is measured, ascending; besides, the whole model and the model without the layer.

    Raises:
        ValueError: See ``Allocation``; or rates that are not between 0 and 1, or do not rise.
    """

    needs_damage = True

    def __init__(self, floor: float = 0.0, cap: float = 0.7, rates: Sequence[float] = (0.15, 0.3, 0.5)) -> None:
        super().__init__(floor, cap)
        if not rates or sorted(set(rates)) != list(rates) or not 0 < rates[0] <= rates[-1] < 1:
            raise ValueError(f"allocation: rates must rise between 0 and 1, got {list(rates)}")
        self.rates = tuple(rates)

    def removals(
        self,
        shapes: Sequence[LayerShape],
        target: int,
        damage: LayerDamage | None,
        scores: Sequence[LayerScores] | None,
    ) -> list[Removal]:
        """See ``Allocation.removals``."""
        self.check_target(shapes, target)
        assert damage is not None
        sizes = [prunable_parameters(shape) for shape in shapes]
        pieces = []  # slope in nats a parameter, layer, width as a share of it
        for index, size in enumerate(sizes):
            between = damage.partly[index] if damage.partly else []
            hull = lower_hull([(0.0, damage.dense), *between, (1.0, damage.without[index])])
            for (start, low), (end, high) in pairwise(hull):
                width = min(end, self.cap) - max(start, self.floor)
                if width > 0:
                    pieces.append(((high - low) / (end - start) / size, index, width))
        rates = [self.floor] * len(shapes)
        left = target - self.floor * sum(sizes)
        for _, index, width in sorted(pieces):
            taken = min(width, left / sizes[index])
            rates[index] += taken
            left -= taken * sizes[index]
        return [Removal(rate * s.groups, rate * s.channels) for rate, s in zip(rates, shapes, strict=True)]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points on the lower convex hull, from left to right: slopes rise along it."""
    hull: list[Point] = []
    lowest: dict[float, float] = {}
    for share, loss in points:  # whole parts of a small layer may be the same at two rates
        lowest[share] = min(loss, lowest.get(share, loss))
    for point in sorted(lowest.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])

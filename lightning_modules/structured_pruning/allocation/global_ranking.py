"""One ranking of all parts of all layers."""

from collections.abc import Sequence

import torch

from lightning_modules.structured_pruning.allocation.base import Allocation
from lightning_modules.structured_pruning.budget import Removal
from lightning_modules.structured_pruning.importance.base import LayerScores
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import LayerShape


class Global(Allocation):
    """Removes the parts of least importance per parameter, wherever they are; floor and cap hold for both kinds."""

    needs_scores = True

    @property
    def name(self) -> str:
        """The name in records; the word itself cannot name a module."""
        return "global"

    def removals(
        self,
        shapes: Sequence[LayerShape],
        target: int,
        damage: LayerDamage | None,
        scores: Sequence[LayerScores] | None,
    ) -> list[Removal]:
        """See ``Allocation.removals``."""
        self.check_target(shapes, target)
        assert scores is not None
        value, cost, owner = [], [], []
        removed = torch.zeros(len(shapes) * 2)
        for i, (shape, layer) in enumerate(zip(shapes, scores, strict=True)):
            kinds = ((layer.groups, shape.group_parameters), (layer.channels, shape.channel_parameters))
            for kind, (part, parameters) in enumerate(kinds):
                lowest = part.sort().values / parameters
                most, least = round(self.cap * len(part)), round(self.floor * len(part))
                removed[2 * i + kind] = least
                target -= least * parameters
                value.append(lowest[least:most])
                cost.append(torch.full((most - least,), float(parameters), dtype=torch.float64))
                owner.append(torch.full((most - least,), 2 * i + kind))
        values, costs, owners = torch.cat(value), torch.cat(cost), torch.cat(owner)
        order = values.argsort(stable=True)
        goes = order[costs[order].cumsum(0) <= target]
        removed += torch.bincount(owners[goes], minlength=len(removed))
        return [Removal(*pair) for pair in removed.view(-1, 2).tolist()]

"""|weight · gradient|, layer by layer, each scored with the layers before it already pruned."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from lightning_modules.structured_pruning.importance.base import Keep, LayerScores, best
from lightning_modules.structured_pruning.importance.weight_taylor import WeightTaylor, saliences
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.masking import layer_masked
from lightning_modules.structured_pruning.plan import LayerPlan


class SequentialTaylor(WeightTaylor):
    """Like WeightTaylor, with one pass a layer: earlier layers are pruned before the next is scored.

    Costs as many passes as there are layers, and one more to begin with. Parts are removed by zeroing what they send to
    o_proj and down_proj, which computes the same as slicing.
    """

    rescores = True

    def rescore(
        self, model: Any, batches: Sequence[dict[str, Tensor]], scores: list[LayerScores], keep: list[Keep]
    ) -> list[LayerScores]:
        """See ``Importance.rescore``."""
        found = []
        with ExitStack() as pruned:
            for i, layer in enumerate(decoder_layers(model)):
                (salience,) = saliences(model, batches, [i])
                found.append(self.combine(salience, layer))
                groups, channels = (best(part, count) for part, count in zip(found[-1], keep[i], strict=True))
                pruned.enter_context(layer_masked(layer, shape_of(layer), LayerPlan(groups, channels)))
        return found

"""Several targets as one."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.losses import normalise
from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Reading, Target, together
from lightning_modules.token_pruning.targets.gate_gradient import GateGradient
from lightning_modules.token_pruning.targets.self_information import SelfInformation


class WeightedSum(Target):
    """Weighted sum of other targets, each brought to mean 0 and deviation 1 in every prompt first.

    Args:
        targets: What is added.
        weights: Of each; by default 1.

    Raises:
        ValueError: no targets, or not one weight for each.
    """

    def __init__(self, targets: list[Target], weights: list[float] | None = None) -> None:
        self.targets, self.weights = targets, [1.0] * len(targets) if weights is None else weights
        counts = len(targets), len(self.weights)
        if not targets or counts[0] != counts[1]:
            raise ValueError(f"targets, weights: need at least one target and one weight for each, got {counts}")

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls([SelfInformation(), GateGradient()], [1.0, 0.5])]

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``; all targets share one pass."""
        readings = [target.reading(model, samples, layers) for target in self.targets]

        def values(logits: Tensor | None) -> dict[int, Tensor]:
            shape, device = samples.prompt.shape, samples.prompt.device
            totals = {layer: torch.zeros(shape, dtype=torch.float32, device=device) for layer in layers}
            for reading, weight in zip(readings, self.weights, strict=True):
                for layer, value in reading.values(logits).items():
                    # ``normalise`` hides what is not finite; the sum must not
                    broken = ~value.isfinite()
                    totals[layer] += weight * normalise(value, samples.prompt).masked_fill(broken, torch.nan)
            return totals

        return together(readings, values)

"""Chance: what a method must beat."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.structured_pruning.importance.base import Importance, LayerScores
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.memory import Workload


class Random(Importance):
    """Uniform random importances.

    Args:
        seed: Where the random numbers start.
    """

    passes = 0.0

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [shape_of(layer) for layer in decoder_layers(model)]
        return [
            LayerScores(torch.rand(s.groups, generator=generator), torch.rand(s.channels, generator=generator))
            for s in shapes
        ]

    def memory(self, work: Workload) -> int:
        """See ``Importance.memory``."""
        return 0

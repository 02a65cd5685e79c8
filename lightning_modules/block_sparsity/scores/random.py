"""No criterion at all: what every other score must beat."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.randomness import step_seed
from lightning_modules.batches import Batch
from lightning_modules.block_sparsity.scores.base import Score


class Random(Score):
    """Uniform random numbers, the same for the same seed.

    Args:
        seed: Seed of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def statistics(
        self, model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        """Random numbers ``float32 [R, C]``: a copy of the matrices in memory."""
        found = {}
        for number, (name, matrix) in enumerate(matrices.items()):
            generator = torch.Generator().manual_seed(step_seed(self.seed, number, 0))
            found[name] = torch.rand(matrix.weight.shape, generator=generator).to(matrix.weight.device)
        return found

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        return statistic.clone()

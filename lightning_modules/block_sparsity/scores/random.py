"""No criterion at all: what every other score must beat."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.block_sparsity.scores.base import Score
from lightning_modules.randomness import step_seed


class Random(Score):
    """Uniform random numbers, the same for the same seed.

    Args:
        seed: Seed of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def statistics(
        self, model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        """A number for each matrix, so that no two get the same draw."""
        return {name: torch.tensor(number) for number, name in enumerate(matrices)}

    def score(self, weight: Tensor, statistic: Tensor | None, rows: slice) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        first, last, _ = rows.indices(len(weight))
        generator = torch.Generator().manual_seed(step_seed(self.seed, first, int(statistic)))
        return torch.rand(last - first, weight.shape[1], generator=generator).to(weight.device)

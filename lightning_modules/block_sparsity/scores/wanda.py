"""Weights times the inputs they meet."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.batches import Batch
from lightning_modules.block_sparsity.scores.base import Score
from lightning_modules.block_sparsity.stream import input_norms


class Wanda(Score):
    """|W|·‖X‖: a weight matters as much as the values it multiplies. Sun et al., arXiv 2306.11695.

    ‖X‖ is the L2 norm of each input column over the calibration tokens, from one pass of the current weights.
    """

    def statistics(
        self, model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        """Input norms ``float32 [C]``."""
        return input_norms(model, matrices, batches, device)

    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """See ``Score.score``."""
        assert statistic is not None
        return weight.float().abs().mul_(statistic)

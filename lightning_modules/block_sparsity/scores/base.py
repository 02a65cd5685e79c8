"""What a weight score is.

Shape legend: R, C rows (outputs) and columns (inputs) of a matrix; B sequences, T tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.variants import Variant
from lightning_modules.batches import Batch
from lightning_modules.block_sparsity.inputs import Inputs


class Score(Variant):
    """How important each weight of a matrix is, from the weight and one statistic of its matrix.

    Scores are compared inside one matrix (or row, or, under a global scope, over all matrices). The statistic is made
    from what calibration text gives to the matrix (``statistic``), or from the model as a whole (``statistics``).
    """

    needs_inputs = False
    """Whether ``statistic`` looks at the inputs."""
    needs_moments = False
    """Whether it looks at their moments, too."""

    def statistic(self, weight: Tensor, inputs: Inputs) -> Tensor | None:
        """What the score needs to know of one matrix besides its weights; nothing by default.

        Args:
            weight: The matrix ``[R, C]``.
            inputs: What calibration text gives to it.

        Returns:
            ``[C]`` or ``[R, C]``, on the weight's device.
        """
        return None

    def statistics(
        self, model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        """The same for every matrix by name, where it does not come from its inputs; nothing by default.

        Asked before anything is pruned.

        Args:
            model: A Hugging Face causal language model with its current weights.
            matrices: The linear layers to score.
            batches: Calibration text, see ``batches.Batch``.
            device: Where to compute.
        """
        return {}

    @abstractmethod
    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """Scores of some weights, ``float32`` in the weights' shape, not negative, freshly made; each by itself.

        Args:
            weight: Any part of a matrix: rows ``[rows, C]`` or blocks ``[n, b, b]``.
            statistic: What is known of that part; broadcasts against it.
        """

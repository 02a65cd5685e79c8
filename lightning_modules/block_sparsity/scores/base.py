"""What a weight score is.

Shape legend: R, C rows (outputs) and columns (inputs) of a matrix; B sequences, T tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.variants import Variant
from lightning_modules.batches import Batch


class Score(Variant):
    """How important each weight of a matrix is, from the weight and one statistic of its matrix.

    Scores are compared inside one matrix (or row, or, under a global scope, over all matrices).
    """

    def statistics(
        self, model: nn.Module, matrices: Mapping[str, nn.Linear], batches: Sequence[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        """What the score needs to know of each matrix besides its weights, by name; nothing by default.

        ``[C]``, or ``[R, C]`` on the matrix's device.

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
            statistic: What ``statistics`` says of that part; broadcasts against it.
        """

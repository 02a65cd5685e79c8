"""What a trained scorer consists of.

Shape legend: B sequences, N tokens, H hidden size.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from common.variants import Variant


class Network(Variant):
    """Kind and size of the network that scores the output of each pruning layer.

    Attributes:
        pool: See `Scorer`.
        asking: See `Scorer`.
    """

    pool: int = 1
    asking: int = 0

    @abstractmethod
    def build(self, hidden_size: int) -> nn.Module:
        """An untrained network for one layer: from hidden states [B, N, H] and which tokens are there, bool [B, N] or
        None for all, to scores [B, N]; higher means keep."""

    @abstractmethod
    def flops(self, tokens: int, hidden_size: int) -> float:
        """Floating-point operations to score so many tokens once."""

    def start(self, scorer: nn.Module, model: Any) -> None:
        """Give a network that `build` made a better start than random weights.

        Args:
            scorer: The network of one layer.
            model: The model to prune.

        Raises:
            ValueError: The model has not what it starts from.
        """

    def logits(self, scores_BN: Tensor) -> Tensor:
        """Scores as losses and noise take them: any number, and a softmax says how likely each token is wanted."""
        return scores_BN

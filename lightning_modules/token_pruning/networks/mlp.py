"""A perceptron on each token alone.

SDTP (arXiv 2504.04514) uses a two-layer GELU perceptron per pruning point. Here it has an input norm, because hidden
states differ by orders of magnitude between layers and tokens, and one output.
"""

import torch
from torch import Tensor, nn

from lightning_modules.token_pruning.networks.base import Network


class MLP(Network):
    """Input norm, hidden size → `width`, GELU, → 1. It sees each token alone, so it cannot know what will be asked.

    Args:
        width: Inner width.
    """

    def __init__(self, width: int = 1024) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width

    def build(self, hidden_size: int) -> nn.Module:
        """See `Network.build`."""
        last = nn.Linear(self.width, 1)
        with torch.no_grad():
            # all scores start near 0, so that soft masks start equal for all tokens and move by what is learned
            last.weight.mul_(0.1)
            last.bias.zero_()
        return _Perceptron(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, self.width), nn.GELU(), last)

    def flops(self, tokens: int, hidden_size: int) -> float:
        """See `Network.flops`."""
        return 2.0 * tokens * self.width * (hidden_size + 1)


class _Perceptron(nn.Sequential):
    def forward(self, hidden_BNH: Tensor, there_BN: Tensor | None = None) -> Tensor:
        scores_BN1: Tensor = super().forward(hidden_BNH)
        return scores_BN1.squeeze(-1)

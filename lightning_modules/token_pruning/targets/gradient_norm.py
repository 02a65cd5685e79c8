"""Length of the gradient."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target, hidden_gradients


class GradientNorm(Target):
    """How fast the loss can change with a token's hidden state: ‖∂loss/∂h‖₂ (saliency maps, arXiv 1312.6034)."""

    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        pairs = hidden_gradients(model, samples, layers)
        return {layer: gradient.norm(dim=-1) for layer, (_, gradient) in pairs.items()}

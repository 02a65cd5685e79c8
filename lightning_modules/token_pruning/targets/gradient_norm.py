"""Length of the gradient."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Reading, Target, hidden_gradients


class GradientNorm(Target):
    """How fast the loss can change with a token's hidden state: ‖∂loss/∂h‖₂ (saliency maps, arXiv 1312.6034)."""

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``."""
        return hidden_gradients(model, samples, layers, lambda _, gradient: gradient.norm(dim=-1))

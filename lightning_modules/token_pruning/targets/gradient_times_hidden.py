"""|gradient · hidden|, the saliency of SDTP."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target, hidden_gradients


class GradientTimesHidden(Target):
    """Size of the first-order change of the loss when a token's hidden state is set to 0: |Σ_H ∂loss/∂h · h|.

    Source: SDTP (arXiv 2504.04514), section 3, which leaves sign and reduction open.
    """

    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        pairs = hidden_gradients(model, samples, layers)
        return {layer: (hidden * gradient).sum(-1).abs() for layer, (hidden, gradient) in pairs.items()}

"""|gradient · hidden|, the saliency of SDTP."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Reading, Target, hidden_gradients


class GradientTimesHidden(Target):
    """Size of the first-order change of the loss when a token's hidden state is set to 0: |Σ_H ∂loss/∂h · h|.

    Source: SDTP (arXiv 2504.04514), section 3, which leaves sign and reduction open.
    """

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``."""
        return hidden_gradients(model, samples, layers, lambda hidden, gradient: (hidden * gradient).sum(-1).abs())

"""Gradient · hidden with its sign: a control."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target, hidden_gradients


class SignedGradientTimesHidden(Target):
    """Σ_H ∂loss/∂h · h with its sign, as the published SDTP and E-RECAP scripts store it.

    A control, not for use: a high value means that the token raises the loss, and those scripts keep it first.
    """

    control = True

    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        pairs = hidden_gradients(model, samples, layers)
        return {layer: (hidden * gradient).sum(-1) for layer, (hidden, gradient) in pairs.items()}

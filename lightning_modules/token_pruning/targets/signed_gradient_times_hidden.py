"""Gradient · hidden with its sign: a control."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Reading, Target, hidden_gradients


class SignedGradientTimesHidden(Target):
    """Σ_H ∂loss/∂h · h with its sign, as the published SDTP and E-RECAP scripts store it.

    A control, not for use: a high value means that the token raises the loss, and those scripts keep it first.
    """

    control = True

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``."""
        return hidden_gradients(model, samples, layers, lambda hidden, gradient: (hidden * gradient).sum(-1))

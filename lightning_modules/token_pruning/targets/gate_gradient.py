"""First-order effect of removing a token from all later attention."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target, gate_gradients


class GateGradient(Target):
    """−∂loss/∂gate, the gate being what pruning closes: how much the loss rises, to first order, without the token.

    The gates are those of Michel et al. (arXiv 1905.10650) for heads, put on the keys of every layer after the pruning
    point.

    Args:
        signed: False takes the size of the effect, so that tokens that mislead the model count as important too.
    """

    def __init__(self, signed: bool = True) -> None:
        self.signed = signed

    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        gradients = gate_gradients(model, samples, layers)
        return {layer: -gradient if self.signed else gradient.abs() for layer, gradient in gradients.items()}

"""First-order effect of removing a token from all later attention."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Reading, Target, loss_gradients


class GateGradient(Target):
    """−∂loss/∂gate, the gate being what pruning closes: how much the loss rises, to first order, without the token.

    The gate multiplies the attention that all layers after the pruning point give to the token as a key (its logarithm
    is added to the attention logits), its own query excepted, and stands at 1. The gates are those of Michel et al.
    (arXiv 1905.10650) for heads, put on keys.

    Args:
        signed: False takes the size of the effect, so that tokens that mislead the model count as important too.
    """

    def __init__(self, signed: bool = True) -> None:
        self.signed = signed

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``."""
        gates: dict[int, Tensor] = {}

        def gate(index: int, hidden_BNH: Tensor) -> tuple[Tensor, Tensor | None]:
            if index <= min(layers):
                return hidden_BNH, None
            gates[index] = torch.zeros_like(hidden_BNH[..., 0], requires_grad=True)  # d log(gate) = d gate at gate 1
            return hidden_BNH, gates[index]

        def values(logits: Tensor | None) -> dict[int, Tensor]:
            device = samples.prompt.device  # layers may be on others
            each = loss_gradients(model, samples, logits, list(gates.values()))
            gradients = {index: gradient.to(device) for index, gradient in zip(gates, each, strict=True)}
            found = {}
            for layer in layers:
                total_BN = torch.stack([gradient for index, gradient in gradients.items() if index > layer]).sum(0)
                found[layer] = -total_BN if self.signed else total_BN.abs()
            return found

        return Reading(values, change=gate, responses=True)

"""What a saliency target is, and the gradients that most are made of.

Shape legend: B sequences, N tokens, H hidden size.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.variants import Variant
from lightning_modules.batches import logits as logits_of
from lightning_modules.token_pruning.samples import Samples, response_nll
from lightning_modules.token_pruning.soft_mask import layer_inputs

_HALF_SCALE = 2.0**10  # float16 gradients of single tokens lie below its smallest number


class Target(Variant):
    """How much each prompt token matters for the response, seen from a layer's output; higher means keep.

    Attributes:
        control: Known to be wrong, and here to be compared with.
    """

    control: bool = False

    @abstractmethod
    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """Saliency at the outputs of some decoder layers.

        Args:
            model: A frozen causal language model.
            samples: Prompts and responses; only response tokens count in the loss.
            layers: Decoder layers, each with one after it.

        Returns:
            float32 [B, N] by layer; of no meaning outside the prompts. Not finite where half precision overflowed.
        """


def hidden_gradients(
    model: PreTrainedModel, samples: Samples, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Outputs of layers, and the gradients of every sample's mean response loss with respect to them.

    Returns:
        Hidden states and gradients by layer, float32 [B, N, H].
    """
    hidden: dict[int, Tensor] = {}

    def watch(index: int, hidden_BNH: Tensor) -> tuple[Tensor, None]:
        if index - 1 in layers:
            hidden[index - 1] = hidden_BNH if hidden_BNH.requires_grad else hidden_BNH.detach().requires_grad_()
            return hidden[index - 1], None
        return hidden_BNH, None

    with torch.enable_grad(), layer_inputs(model, samples.real, watch):
        scale, loss = _loss(model, samples)
        gradients = torch.autograd.grad(loss, [hidden[layer] for layer in layers])
    return {
        layer: (hidden[layer].detach().float(), gradient.float() / scale)
        for layer, gradient in zip(layers, gradients, strict=True)
    }


def gate_gradients(model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
    """Gradients of every sample's mean response loss with respect to a gate on each token, at 1.

    The gate multiplies the attention that all layers after the pruning point give to the token as a key (its logarithm
    is added to the attention logits), its own query excepted: what pruning the token sets to 0.

    Returns:
        ∂loss/∂gate by layer, float32 [B, N].
    """
    gates: dict[int, Tensor] = {}

    def gate(index: int, hidden_BNH: Tensor) -> tuple[Tensor, Tensor | None]:
        if index <= min(layers):
            return hidden_BNH, None
        gates[index] = torch.zeros_like(hidden_BNH[..., 0], requires_grad=True)  # d log(gate) = d gate at gate 1
        return hidden_BNH, gates[index]

    with torch.enable_grad(), layer_inputs(model, samples.real, gate):
        scale, loss = _loss(model, samples)
        gradients = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))
    totals = {}
    for layer in layers:
        totals[layer] = sum((g.float() for index, g in gradients.items() if index > layer), torch.zeros(())) / scale
    return totals


def _loss(model: PreTrainedModel, samples: Samples) -> tuple[float, Tensor]:
    """Scale, and the scaled sum over samples of their mean response loss: no sample's gradient sees another's."""
    logits = logits_of(model, samples.inputs())
    nll, tokens = response_nll(logits, samples.labels)
    scale = _HALF_SCALE if model.dtype == torch.float16 else 1.0
    return scale, (nll / tokens.clamp_min(1)).sum() * scale

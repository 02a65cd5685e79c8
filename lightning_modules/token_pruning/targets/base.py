"""What a saliency target is, what it reads of a model, and the gradients that many are made of.

Shape legend: B sequences, N tokens, H hidden size, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.variants import Variant
from lightning_modules.batches import logits as logits_of
from lightning_modules.token_pruning.anatomy import Rotary
from lightning_modules.token_pruning.passes import See, ending_at, watched
from lightning_modules.token_pruning.samples import Samples, response_logits, response_nll
from lightning_modules.token_pruning.soft_mask import LayerInput, layer_inputs

_HALF_SCALE = 2.0**10  # float16 gradients of single tokens lie below its smallest number


@dataclass(frozen=True)
class Reading:
    """What a target wants of a forward pass over the samples; several targets can share one.

    Attributes:
        values: Saliency by layer, from the logits [B, N, V] of the pass (None where it ended before).
        last: The layer whose input is the last thing that is needed; None needs the logits.
        see: Is shown what enters every layer.
        change: Replaces it, for gradients: the pass then keeps what they need.
        responses: Logits from the token before the first response on are enough, [B, M, V] of the last M tokens.
    """

    values: Callable[[Tensor | None], dict[int, Tensor]]
    last: int | None = None
    see: See | None = None
    change: LayerInput | None = None
    responses: bool = False


class Target(Variant):
    """How much each prompt token matters for the response, seen from a layer's output; higher means keep.

    Attributes:
        control: Known to be wrong, and here to be compared with.
    """

    control: bool = False

    @abstractmethod
    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """What to read for the saliency at the outputs of some decoder layers.

        Args:
            model: A frozen causal language model.
            samples: Prompts and responses; only response tokens count in the loss.
            layers: Decoder layers, each with one after it.

        Returns:
            What gives float32 [B, N] by layer, where the prompts are; of no meaning outside of them. Not finite where
            half precision overflowed.
        """

    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """Saliency at the outputs of some decoder layers, from one pass that ends where nothing more is needed.

        Args:
            model: See `reading`.
            samples: See `reading`.
            layers: See `reading`.

        Returns:
            See `reading`.
        """
        return read(model, samples, self.reading(model, samples, layers))


def read(model: PreTrainedModel, samples: Samples, reading: Reading) -> dict[int, Tensor]:
    """The values of a reading, from one forward pass."""
    logits = None
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(reading.change is not None))
        if reading.change is not None:
            stack.enter_context(layer_inputs(model, samples.real, reading.change))
        if reading.see is not None:
            stack.enter_context(watched(model, _by_row(reading.see, samples)))
        stack.enter_context(ending_at(model, reading.last))
        logits = response_logits(model, samples) if reading.responses else logits_of(model, samples.inputs())
    return reading.values(logits)


def _by_row(see: See, samples: Samples) -> See:
    """Show rows also where flash attention reads all of them as one, see ``batches.outputs``."""
    shape = samples.real.shape

    def rows(index: int, hidden_BNH: Tensor, rotary: Rotary | None) -> None:
        if hidden_BNH.shape[:2] != shape:
            hidden_BNH = hidden_BNH.reshape(*shape, -1)
            rotary = rotary and (rotary[0].reshape(*shape, -1), rotary[1].reshape(*shape, -1))
        see(index, hidden_BNH, rotary)

    return rows


def together(readings: Sequence[Reading], values: Callable[[Tensor | None], dict[int, Tensor]]) -> Reading:
    """Several readings of one pass, as one.

    Args:
        readings: What must be read; log masks are added.
        values: Uses theirs.
    """
    changes = [reading.change for reading in readings if reading.change is not None]
    seeing = [reading.see for reading in readings if reading.see is not None]
    lasts = [reading.last for reading in readings if reading.last is not None]

    def change(index: int, hidden_BNH: Tensor) -> tuple[Tensor, Tensor | None]:
        total_BN: Tensor | None = None
        for one in changes:
            hidden_BNH, log_mask_BN = one(index, hidden_BNH)
            if log_mask_BN is not None:
                total_BN = log_mask_BN if total_BN is None else total_BN + log_mask_BN
        return hidden_BNH, total_BN

    def see(index: int, hidden_BNH: Tensor, rotary: Rotary | None) -> None:
        for one in seeing:
            one(index, hidden_BNH, rotary)

    return Reading(
        values,
        last=max(lasts) if len(lasts) == len(readings) else None,
        see=see if seeing else None,
        change=change if changes else None,
        responses=all(reading.responses for reading in readings if reading.last is None),
    )


def hidden_gradients(
    model: PreTrainedModel, samples: Samples, layers: Sequence[int], value: Callable[[Tensor, Tensor], Tensor]
) -> Reading:
    """Outputs of layers, and the gradients of every sample's mean response loss with respect to them.

    Args:
        model: See `Target.reading`.
        samples: See `Target.reading`.
        layers: See `Target.reading`.
        value: From hidden states and gradients, float32 [B, N, H], to saliency [B, N].
    """
    hidden: dict[int, Tensor] = {}

    def keep(index: int, hidden_BNH: Tensor) -> tuple[Tensor, None]:
        if index - 1 in layers:
            hidden[index - 1] = hidden_BNH if hidden_BNH.requires_grad else hidden_BNH.detach().requires_grad_()
            return hidden[index - 1], None
        return hidden_BNH, None

    def values(logits: Tensor | None) -> dict[int, Tensor]:
        gradients = loss_gradients(model, samples, logits, [hidden[layer] for layer in layers])
        pairs = zip(layers, gradients, strict=True)
        device = samples.prompt.device  # layers may be on others
        return {layer: value(hidden[layer].detach().float(), gradient).to(device) for layer, gradient in pairs}

    return Reading(values, change=keep, responses=True)


def loss_gradients(
    model: PreTrainedModel, samples: Samples, logits: Tensor | None, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of every sample's mean response loss, float32: no sample's sees another's."""
    assert logits is not None
    with torch.enable_grad():
        nll, tokens = response_nll(logits, samples.labels)
        scale = _HALF_SCALE if model.dtype == torch.float16 else 1.0
        loss = (nll / tokens.clamp_min(1)).sum() * scale
    # others may want gradients from the same pass
    return [gradient.float() / scale for gradient in torch.autograd.grad(loss, list(tensors), retain_graph=True)]

"""Attention that the response will pay."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.anatomy import Rotary, anatomy
from lightning_modules.token_pruning.attention import mean_attention
from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Reading, Target


class FutureAttention(Target):
    """Mean attention probability that the queries predicting the response give to a token, over heads and later layers.

    The quantity that H2O (arXiv 2306.14048) accumulates, read from the future: an oracle for attention-based scores.
    Only the rows of these queries are computed, beside a forward pass with whatever kernel the model has.

    Raises:
        UnsupportedModelError: From ``values``: a layer is offloaded, or see ``anatomy``.
    """

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``."""
        parts = anatomy(model)
        predicts_BN = torch.roll(samples.labels != IGNORED, -1, dims=1)
        share_BN = predicts_BN.float() / predicts_BN.sum(1, keepdim=True)
        received: dict[int, Tensor] = {}

        def see(index: int, hidden_BNH: Tensor, rotary: Rotary | None) -> None:
            if index > min(layers):
                paid_BAN = mean_attention(parts, index, hidden_BNH, share_BN, rotary, samples.real)
                received[index] = paid_BAN.mean(1).to(samples.input_ids.device)

        def values(_: Tensor | None) -> dict[int, Tensor]:
            return {
                layer: torch.stack([paid for index, paid in received.items() if index > layer]).mean(0)
                for layer in layers
            }

        return Reading(values, last=len(parts.layers) - 1, see=see)

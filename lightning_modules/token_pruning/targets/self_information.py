"""How surprising a token is to the model that reads it."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples, token_nll
from lightning_modules.token_pruning.targets.base import Reading, Target


class SelfInformation(Target):
    """Information that a token adds to those before it: −log p(token | tokens before), in nats, by the model itself.

    Source: Selective Context (arXiv 2310.06201), which drops the rest from the text. It needs a whole forward pass,
    which a scorer that has learned it does not. The same at every layer, and blind to the response: what the model
    could have guessed is not missed, whatever is asked. A first token, before which there is nothing, counts as a guess
    among the whole vocabulary.
    """

    def reading(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> Reading:
        """See ``Target.reading``."""

        def values(logits: Tensor | None) -> dict[int, Tensor]:
            assert logits is not None
            nll_BN = token_nll(logits.detach(), samples.input_ids.to(logits.device))
            nats_BN = F.pad(nll_BN, (1, 0)).to(samples.real.device)
            first_BN = samples.real & (samples.real.cumsum(1) == 1)
            return dict.fromkeys(layers, nats_BN.masked_fill(first_BN, math.log(logits.shape[-1])))

        return Reading(values)

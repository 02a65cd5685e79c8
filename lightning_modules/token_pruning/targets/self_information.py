"""How surprising a token is to the model that reads it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target


class SelfInformation(Target):
    """Information that a token adds to those before it: −log p(token | tokens before), in nats, by the model itself.

    Source: Selective Context (arXiv 2310.06201), which drops the rest from the text. It needs a whole forward pass,
    which a scorer that has learned it does not. The same at every layer, and blind to the response: what the model
    could have guessed is not missed, whatever is asked. A first token, before which there is nothing, counts as a guess
    among the whole vocabulary.
    """

    @torch.no_grad()
    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        logits = model(**samples.inputs(), use_cache=False).logits
        nats_BN = F.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), samples.input_ids[:, 1:].to(logits.device), reduction="none"
        )
        guess = math.log(logits.shape[-1])
        nats_BN = F.pad(nats_BN, (1, 0), value=guess).to(samples.real.device)
        first_BN = samples.real & (samples.real.cumsum(1) == 1)
        nats_BN = nats_BN.masked_fill(first_BN, guess)
        return dict.fromkeys(layers, nats_BN)

"""Attention that the response will pay."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target


class FutureAttention(Target):
    """Mean attention probability that the queries predicting the response give to a token, over heads and later layers.

    The quantity that H2O (arXiv 2306.14048) accumulates, read from the future: an oracle for attention-based scores.
    """

    @torch.no_grad()
    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        chosen = model.config._attn_implementation
        model.set_attn_implementation("eager")  # the only one that returns probabilities
        try:
            attentions_BANN = model(
                **samples.inputs(),
                use_cache=False,
                output_attentions=True,
            ).attentions
        finally:
            model.set_attn_implementation(chosen)
        predicts = torch.roll(samples.labels != IGNORED, -1, dims=1).float()
        share = predicts / predicts.sum(1, keepdim=True)
        received_LBN = [torch.einsum("bq,bqk->bk", share, a.float().mean(1)) for a in attentions_BANN]
        return {layer: torch.stack(received_LBN[layer + 1 :]).mean(0) for layer in layers}

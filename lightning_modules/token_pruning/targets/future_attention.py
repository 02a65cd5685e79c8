"""Attention that the response will pay."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.batches import logits as logits_of
from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.anatomy import anatomy
from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.targets.base import Target


class FutureAttention(Target):
    """Mean attention probability that the queries predicting the response give to a token, over heads and later layers.

    The quantity that H2O (arXiv 2306.14048) accumulates, read from the future: an oracle for attention-based scores.
    Only the rows of these queries are computed, beside a forward pass with whatever kernel the model has.

    Raises:
        UnsupportedModelError: From ``values``: a layer is offloaded, or see ``anatomy``.
    """

    @torch.no_grad()
    def values(self, model: PreTrainedModel, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See ``Target.values``."""
        parts = anatomy(model)
        predicts_BN = torch.roll(samples.labels != IGNORED, -1, dims=1)
        share_BN = predicts_BN.float() / predicts_BN.sum(1, keepdim=True)
        window = share_BN.shape[1] - int(predicts_BN.any(0).float().argmax())
        received: dict[int, Tensor] = {}

        def watch(index: int) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                call = dict(zip(parts.arguments, args, strict=False)) | kwargs
                rotary = call.get("position_embeddings")
                paid_BWN = tail_attention(parts, index, call["hidden_states"], window, rotary, samples.real).mean(1)
                received[index] = torch.einsum("bw,bwn->bn", share_BN[:, -window:].to(paid_BWN.device), paid_BWN)

            return before

        watched = range(min(layers) + 1, len(parts.layers))
        handles = [parts.layers[i].register_forward_pre_hook(watch(i), with_kwargs=True) for i in watched]
        try:
            logits_of(model, samples.inputs(), logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        device = samples.input_ids.device
        return {layer: torch.stack([received[i].to(device) for i in watched if i > layer]).mean(0) for layer in layers}

"""How much each decoder layer changes what passes through it: one pass for all layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.batches import Batch, logits, tokens_of
from lightning_modules.structured_pruning.layers import decoder_layers


@torch.no_grad()
def block_influence(
    model: Any, batches: Sequence[Batch], done: Callable[[int], None] = lambda count: None
) -> list[float]:
    """1 − mean over tokens of the cosine between a layer's input and output (ShortGPT, arXiv 2403.03853).

    Args:
        model: A supported causal language model.
        batches: Text to measure on; padding does not count.
        done: Told the number of batches done, for progress.

    Returns:
        One a layer; a layer of little influence is worth little.
    """
    layers = decoder_layers(model)
    cosines = torch.zeros(len(layers), dtype=torch.float64)
    count = 0

    def watch(index: int, batch: Batch) -> Any:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            before: Tensor = arguments[0] if arguments else keywords["hidden_states"]
            after: Tensor = output[0] if isinstance(output, tuple) else output
            before, after = (tokens_of(one, batch).float() for one in (before, after))
            cosines[index] += F.cosine_similarity(before, after, dim=-1).sum().double().cpu()

        return hook

    for number, batch in enumerate(batches, 1):
        handles = [layer.register_forward_hook(watch(i, batch), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            logits(model, batch, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        count += len(tokens_of(batch["input_ids"][..., None], batch))
        done(number)
    return [1 - cosine for cosine in (cosines / count).tolist()]

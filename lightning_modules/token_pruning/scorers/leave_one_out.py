"""Keep what would be missed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.token_pruning.samples import Samples, response_logits, response_nll
from lightning_modules.token_pruning.scorers.oracle import Oracle
from lightning_modules.token_pruning.soft_mask import layer_inputs


class LeaveOneOut(Oracle):
    """Rise of the response's loss when one token alone is dropped; one forward pass per token and layer.

    Dropped by the mask that hides it from all other tokens in later layers, which equals removing it.

    Args:
        batch: Prompts with one token missing that run at once.
    """

    def __init__(self, batch: int = 32) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.batch = batch

    @torch.no_grad()
    def measure(self, model: Any, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """See `Oracle.measure`: ΔNLL in nats of the whole response, 0 outside the prompt."""
        worth = {layer: torch.zeros(samples.prompt.shape) for layer in layers}
        for row in range(len(samples.input_ids)):
            sample = samples.pick(torch.tensor([row]))
            whole = _losses(model, sample, [None], 0)
            for layer in layers:
                places = sample.prompt[0].nonzero().flatten().tolist()
                for start in range(0, len(places), self.batch):
                    chunk = places[start : start + self.batch]
                    worth[layer][row, chunk] = (_losses(model, sample, chunk, layer) - whole).cpu()
        return worth


def _losses(model: Any, sample: Samples, missing: Sequence[int | None], layer: int) -> Tensor:
    """Loss of the response for each choice of a token that is missing after `layer`, `[len(missing)]`."""
    many = sample.pick(torch.zeros(len(missing), dtype=torch.long))
    log_mask = torch.zeros(many.prompt.shape, device=many.input_ids.device)
    for row, place in enumerate(missing):
        if place is not None:
            log_mask[row, place] = -torch.inf

    def hide(index: int, hidden_BNH: Tensor) -> tuple[Tensor, Tensor | None]:
        return hidden_BNH, (log_mask if index > layer else None)

    with layer_inputs(model, many.real, hide):
        logits = response_logits(model, many)
    return response_nll(logits, many.labels)[0]

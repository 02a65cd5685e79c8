"""How much a part's output adds to the residual stream; needs no gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.batches import Batch, logits, tokens_of
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of


class Activation(Importance):
    """Σ over tokens of x² · ‖W column‖², with x the input of o_proj or down_proj, summed over the part.

    Forward passes only, like Minitron (arXiv 2407.14679) and FLAP (arXiv 2312.11983), whose fluctuation becomes the
    second moment here because no bias makes up for the mean.
    """

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        device = next(model.parameters()).device
        linears = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in decoder_layers(model)]
        energy = {
            linear: torch.zeros(linear.in_features, device=device, dtype=torch.float32)
            for pair in linears
            for linear in pair
        }
        with torch.no_grad():
            for batch in batches:
                handles = [linear.register_forward_pre_hook(_add(total, batch)) for linear, total in energy.items()]
                try:
                    logits(model, batch, logits_to_keep=1)
                finally:
                    for handle in handles:
                        handle.remove()
        scores = {linear: total * _column_energy(linear) for linear, total in energy.items()}
        return [
            LayerScores(scores[o].view(shape_of(layer).groups, -1).sum(1).cpu(), scores[down].cpu())
            for (o, down), layer in zip(linears, decoder_layers(model), strict=True)
        ]


def _add(total: Tensor, batch: Batch) -> Any:
    def hook(module: nn.Module, arguments: Any) -> None:
        total.add_(tokens_of(arguments[0], batch).float().square().sum(0))

    return hook


def _column_energy(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().float().square().sum(0)

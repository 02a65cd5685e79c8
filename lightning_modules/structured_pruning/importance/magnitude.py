"""Size of a part's weights; needs no text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.structured_pruning.importance.base import Importance, LayerScores
from lightning_modules.structured_pruning.layers import ATTENTION, MLP, decoder_layers, shape_of
from lightning_modules.structured_pruning.memory import Workload


class Magnitude(Importance):
    """Σ w² over a part's weights: rows of q, k, v, gate and up, columns of o and down (Li et al., arXiv 1608.08710)."""

    passes = 0.0

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        found = []
        for layer in decoder_layers(model):
            groups = shape_of(layer).groups
            parts = {name: _energy(layer.self_attn, name).view(groups, -1).sum(1) for name in ATTENTION}
            channels = torch.stack([_energy(layer.mlp, name) for name in MLP]).sum(0)
            found.append(LayerScores(torch.stack(list(parts.values())).sum(0).cpu(), channels.cpu()))
        return found


def _energy(block: Any, name: str) -> Tensor:
    weight = getattr(block, name).weight.detach().float()
    return weight.square().sum(0 if name in ("o_proj", "down_proj") else 1)

    def memory(self, work: Workload) -> int:
        """See ``Importance.memory``."""
        return 0

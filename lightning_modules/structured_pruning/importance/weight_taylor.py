"""|weight · gradient| over all weights of a part."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.structured_pruning.evaluation import backward
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores, gradients_of
from lightning_modules.structured_pruning.layers import ATTENTION, MLP, decoder_layers, shape_of

# Sums of |w · g| of one layer: rows of q, k, v, gate and up (biases included), columns of o and down, by projection.
Salience = dict[str, Tensor]


class WeightTaylor(Importance):
    """Σ |w · ∂L/∂w| over a group's rows of q, k, v and columns of o, and a channel's of gate, up and down.

    First-order Taylor expansion of the loss (LLM-Pruner, arXiv 2305.11627), summed over batches. Each weight's gradient
    is reduced to sums of rows or columns and freed as soon as it is there, so memory is the model, its activations and
    one gradient.
    """

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        layers = decoder_layers(model)
        found = saliences(model, batches, range(len(layers)))
        return [self.combine(salience, layer) for salience, layer in zip(found, layers, strict=True)]

    def combine(self, salience: Salience, layer: Any) -> LayerScores:
        """A layer's sums of rows and columns as importances of its groups and channels."""
        return LayerScores(
            self.group_scores(salience, shape_of(layer).groups), torch.stack([salience[name] for name in MLP]).sum(0)
        )

    def group_scores(self, salience: Salience, groups: int) -> Tensor:
        """Importance of each group ``[G]``: query rows are ``view(G, n_rep · D)``, next to their key-value head."""
        return torch.stack([salience[name].view(groups, -1).sum(1) for name in ATTENTION]).sum(0)


def saliences(model: Any, batches: Sequence[dict[str, Tensor]], layers: Sequence[int]) -> list[Salience]:
    """Sums of |w · g| of these layers, float32 on the CPU, in one pass over the batches."""
    found: list[Salience] = []
    reduced: dict[nn.Parameter, tuple[Tensor, int | None]] = {}
    for layer in (decoder_layers(model)[i] for i in layers):
        sums: Salience = {}
        found.append(sums)
        for name in ATTENTION + MLP:
            linear = getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)
            axis = 0 if name in ("o_proj", "down_proj") else 1
            sums[name] = torch.zeros(linear.weight.shape[1 - axis], device=linear.weight.device, dtype=torch.float32)
            reduced[linear.weight] = (sums[name], axis)
            if linear.bias is not None and axis == 1:  # an output bias belongs to no part
                reduced[linear.bias] = (sums[name], None)
    with gradients_of(model, {id(parameter) for parameter in reduced}):
        handles = [p.register_post_accumulate_grad_hook(_reduce(*into)) for p, into in reduced.items()]
        try:
            for batch in batches:
                backward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return [{name: total.cpu() for name, total in sums.items()} for sums in found]


def _reduce(total: Tensor, axis: int | None) -> Callable[[nn.Parameter], None]:
    def hook(parameter: Any) -> None:
        product = (parameter.detach() * parameter.grad).float().abs()
        total.add_(product if axis is None else product.sum(axis))
        parameter.grad = None

    return hook

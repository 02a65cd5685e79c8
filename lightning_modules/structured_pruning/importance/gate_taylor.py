"""First-order change of the loss when a gate on a part closes, token by token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.structured_pruning.evaluation import backward
from lightning_modules.structured_pruning.importance.base import Importance, LayerScores, gradients_of
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of


class GateTaylor(Importance):
    """Σ over tokens of (x · ∂L/∂x)², with x the part's input of o_proj or down_proj.

    x · ∂L/∂x is the derivative with respect to a gate that multiplies the part (Michel et al., arXiv 1905.10650;
    Molchanov et al., arXiv 1906.10771); squared for each token, signs of different tokens cannot cancel. Weights need
    no gradients, so memory is the model and its activations; gradient checkpointing, where it is on, works.
    """

    def score(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> list[LayerScores]:
        """See ``Importance.score``."""
        device = next(model.parameters()).device
        shapes = [shape_of(layer) for layer in decoder_layers(model)]
        groups = [torch.zeros(s.groups, device=device, dtype=torch.float32) for s in shapes]
        channels = [torch.zeros(s.channels, device=device, dtype=torch.float32) for s in shapes]
        handles = []
        for layer, group, channel in zip(decoder_layers(model), groups, channels, strict=True):
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(_gate(group)))
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(_gate(channel)))
        # Without weights that want gradients, the graph must start somewhere: at the embeddings.
        start = model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_(True))
        try:
            with gradients_of(model, set()):
                for batch in batches:
                    backward(model, batch)
        finally:
            for handle in [*handles, start]:
                handle.remove()
        return [LayerScores(g.cpu(), c.cpu()) for g, c in zip(groups, channels, strict=True)]


class _Gate(torch.autograd.Function):
    """The identity; its backward adds to the importances.

    The input is a saved tensor of autograd, not held by a closure: gradient checkpointing recomputes it.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, importance: Tensor) -> Tensor:
        context.save_for_backward(x)
        context.importance = importance
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = context.saved_tensors
        parts = context.importance.numel()
        change = (x.float() * gradient.float()).view(-1, parts, x.shape[-1] // parts).sum(-1)
        context.importance += change.square().sum(0)
        return gradient, None


def _gate(importance: Tensor) -> Any:
    return lambda module, arguments: (_Gate.apply(arguments[0], importance),)

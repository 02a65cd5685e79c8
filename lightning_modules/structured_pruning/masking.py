"""Removal without slicing: parts of a layer send nothing on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.structured_pruning.layer_damage import skipped
from lightning_modules.structured_pruning.layers import LayerShape, decoder_layers, rows_of, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan


@contextmanager
def masked(model: Any, plan: PruningPlan) -> Iterator[None]:
    """Within the block, the model computes what its slice by this plan would, at the speed of the whole model."""
    with ExitStack() as masks:
        for layer, kept in zip(decoder_layers(model), plan.layers, strict=True):
            masks.enter_context(skipped(layer) if kept.dropped else layer_masked(layer, shape_of(layer), kept))
        yield


@contextmanager
def layer_masked(layer: Any, shape: LayerShape, kept: LayerPlan) -> Iterator[None]:
    """Within the block, only kept groups reach a decoder layer's o_proj and only kept channels its down_proj."""
    heads = torch.zeros(shape.groups * shape.n_rep * shape.head_dim)
    heads[rows_of(kept.queries(shape.n_rep), shape.head_dim)] = 1
    width = torch.zeros(shape.channels)
    width[torch.as_tensor(kept.channels)] = 1
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(_mask(heads, layer.self_attn.o_proj)),
        layer.mlp.down_proj.register_forward_pre_hook(_mask(width, layer.mlp.down_proj)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(mask: Tensor, linear: nn.Linear) -> Any:
    mask = mask.to(linear.weight)
    return lambda module, arguments: (arguments[0] * mask,)

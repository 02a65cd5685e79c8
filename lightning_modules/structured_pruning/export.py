"""Portable export: layers zero-padded to the widest one where they differ, so that a stock class computes the same."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_modules.structured_pruning.footprint import parameters_of
from lightning_modules.structured_pruning.layers import LayerShape, decoder_layers, family, shape_of
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.slicing import global_fields
from lightning_modules.structured_pruning.stock import CONFIGS, filling_groups


@dataclass(frozen=True)
class Padded:
    """A stock model, and what padding costs.

    Attributes:
        model: A homogeneous model of a stock class.
        parameters: Its parameters.
        padding: How many of them are padding.
    """

    model: Any
    parameters: int
    padding: int


@torch.no_grad()
def pad_to_stock(model: Any) -> Padded:
    """Zero-pad every layer to the widest one; what is in a stock shape already stays as it is.

    Llama stays Llama where heads divide the hidden size; elsewhere it becomes Mistral, the same function without that
    rule. With attention or MLP biases, which Mistral lacks, heads are padded until they divide. Mistral stays, and so
    does Qwen2, whose heads are padded until they fill the hidden size, see ``stock.expressible``.

    Args:
        model: A model of a per-layer class, or any supported one.
    """
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    fields = global_fields(model.config)
    target, groups = _padded_heads(model.config, max(s.groups for s in shapes), shapes[0])
    channels = max(s.channels for s in shapes)
    if target != family(model.config):
        fields["sliding_window"] = None
    fields |= {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * shapes[0].n_rep,
        "intermediate_size": channels,
        "head_dim": shapes[0].head_dim,
    }
    padded: Any = AutoModelForCausalLM.from_config(CONFIGS[target](**fields), dtype=model.dtype).to(model.device)
    weights = padded.state_dict()
    for name, weight in model.state_dict().items():
        weights[name] = _pad(weight, weights[name].shape)
    padded.load_state_dict(weights, strict=True)
    padded.generation_config = copy.deepcopy(model.generation_config)
    total = padded.num_parameters()
    return Padded(padded.eval(), total, total - model.num_parameters())


def _pad(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight in the first rows and columns, zeros elsewhere: padded heads and channels send nothing on."""
    padded = weight.new_zeros(shape)
    padded[tuple(slice(0, size) for size in weight.shape)] = weight
    return padded


def padded_parameters(config: Any, whole: ModelShape, plan: Sequence[LayerPlan]) -> int:
    """Parameters of the stock export of what a plan keeps, counted without weights; see ``pad_to_stock``."""
    kept = [(shape, layer) for shape, layer in zip(whole.shapes, plan, strict=True) if not layer.dropped]
    _, groups = _padded_heads(config, max(len(layer.groups) for _, layer in kept), kept[0][0])
    channels = max(len(layer.channels) for _, layer in kept)
    return whole.other_parameters + sum(parameters_of(shape, groups, channels) for shape, _ in kept)


def _padded_heads(config: Any, groups: int, shape: LayerShape) -> tuple[str, int]:
    """The family of the stock export of a model whose widest layer has so many groups, and the groups that it gets."""
    target, n_rep = family(config), shape.n_rep
    if target == "qwen2":  # with more heads than fill the hidden size, it never had the class's own width
        return target, max(groups, filling_groups(config, n_rep, shape.head_dim) or 0)
    if target != "llama" or config.hidden_size % (groups * n_rep) == 0:
        return target, groups
    if not (config.attention_bias or config.mlp_bias):
        return "mistral", groups
    # the model before pruning had a number that divides
    more = range(groups, config.hidden_size + 1)
    return target, next(g for g in more if config.hidden_size % (g * n_rep) == 0)


@torch.no_grad()
def largest_difference(model: Any, other: Any, ids_BT: Tensor) -> float:
    """Largest absolute difference of two models' logits, each computed in the model's own dtype."""
    logits, others = (m(input_ids=ids_BT, use_cache=False).logits.double() for m in (model, other))
    return float((logits - others).abs().max())

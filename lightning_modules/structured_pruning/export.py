"""Portable export: every layer zero-padded to the widest one, so that a stock class computes the same."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from lightning_modules.structured_pruning.layers import decoder_layers, family, shape_of
from lightning_modules.structured_pruning.slicing import global_fields

_STOCK: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


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
    """Zero-pad every layer to the widest one.

    Llama becomes Mistral, the same function without Llama's rule that heads divide the hidden size; with attention or
    MLP biases, which Mistral lacks, it stays Llama and heads are padded until they divide. Mistral and Qwen2 stay.

    Args:
        model: A model of a per-layer class, or any supported one.
    """
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    fields = global_fields(model.config)
    target = family(model.config)
    if target == "llama" and not (fields.get("attention_bias") or fields.get("mlp_bias")):
        target = "mistral"
        fields["sliding_window"] = None
    groups, channels = max(s.groups for s in shapes), max(s.channels for s in shapes)
    if target == "llama":
        groups = _dividing(groups, shapes[0].n_rep, fields["hidden_size"])
    fields |= {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * shapes[0].n_rep,
        "intermediate_size": channels,
        "head_dim": shapes[0].head_dim,
    }
    padded: Any = AutoModelForCausalLM.from_config(_STOCK[target](**fields), dtype=model.dtype).to(model.device)
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


def _dividing(groups: int, n_rep: int, hidden: int) -> int:
    """The next number of groups whose query heads divide the hidden size; the model before pruning had such a one."""
    return next(more for more in range(groups, hidden + 1) if hidden % (more * n_rep) == 0)


@torch.no_grad()
def largest_difference(model: Any, other: Any, ids_BT: Tensor) -> float:
    """Largest absolute difference of two models' logits, each computed in the model's own dtype."""
    logits, others = (m(input_ids=ids_BT, use_cache=False).logits.double() for m in (model, other))
    return float((logits - others).abs().max())

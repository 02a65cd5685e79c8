"""Where heads and channels are in a decoder layer, and what each costs.

A group is one key-value head with the query heads that read it: their rows of q_proj (and its bias), the head's rows of
k_proj and v_proj, and the group's columns of o_proj. Query head h reads key-value head h // n_rep, so the query rows
are ``view(n_kv, n_rep, head_dim)``. A channel is one row of gate_proj and up_proj and one column of down_proj. A model
without grouped queries has groups of one head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_modules.structured_pruning.per_layer_models import CLASSES

_PREFIX = "per_layer_"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer has, and what a part of it costs.

    Attributes:
        groups: Key-value heads.
        n_rep: Query heads that read one key-value head.
        head_dim: Width of a head.
        channels: Width of the MLP.
        group_parameters: Parameters that go with one group.
        channel_parameters: Parameters that go with one channel.
        parameters: Parameters of the whole layer, norms and output biases included.
    """

    groups: int
    n_rep: int
    head_dim: int
    channels: int
    group_parameters: int
    channel_parameters: int
    parameters: int


def family(config: PretrainedConfig) -> str:
    """The architecture before pruning: "llama", "mistral" or "qwen2".

    Raises:
        ValueError: Any other architecture; the message lists the supported ones.
    """
    name = config.model_type.removeprefix(_PREFIX)
    if name not in CLASSES:
        raise ValueError(
            f"model: architecture {config.model_type!r} is not supported by structured pruning; "
            f"supported: {', '.join(CLASSES)}"
        )
    return name


def decoder_layers(model: Any) -> Sequence[Any]:
    """The decoder layers of a supported causal language model, first to last."""
    family(model.config)
    layers: Sequence[Any] = model.model.layers
    return layers


def shape_of(layer: Any) -> LayerShape:
    """Count a decoder layer; works on the meta device."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    groups, n_rep = attention.k_proj.out_features // dim, attention.num_key_value_groups
    rows = {"q_proj": n_rep * dim, "k_proj": dim, "v_proj": dim}
    group = n_rep * dim * attention.o_proj.out_features
    group += sum(count * _row_parameters(getattr(attention, name)) for name, count in rows.items())
    channel = mlp.down_proj.out_features + sum(_row_parameters(p) for p in (mlp.gate_proj, mlp.up_proj))
    total = sum(p.numel() for p in layer.parameters())
    return LayerShape(groups, n_rep, dim, mlp.gate_proj.out_features, group, channel, total)


def _row_parameters(linear: nn.Linear) -> int:
    return linear.in_features + (linear.bias is not None)


def query_heads_of(groups: Sequence[int], n_rep: int) -> list[int]:
    """The query heads that read these key-value heads, in the same order."""
    return [group * n_rep + r for group in groups for r in range(n_rep)]


def rows_of(heads: Sequence[int], head_dim: int) -> Tensor:
    """Rows of a projection that belong to these heads, int64 ``[len(heads) · head_dim]``."""
    return (torch.as_tensor(heads, dtype=torch.long)[:, None] * head_dim + torch.arange(head_dim)).flatten()

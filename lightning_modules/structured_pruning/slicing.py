"""Physical removal: a model that has only what the plan keeps, of the family's own class where that can be."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lightning_modules.structured_pruning.layers import LayerShape, decoder_layers, family, rows_of, shape_of
from lightning_modules.structured_pruning.per_layer_models import CLASSES
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.stock import CONFIGS, expressible

_PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_IDENTITY = ("model_type", "transformers_version", "architectures", "auto_map", "per_layer_config")


@torch.no_grad()
def slice_model(model: Any, plan: PruningPlan) -> Any:
    """Copy what the plan keeps into a new model; ``model`` stays as it is.

    Args:
        model: Any supported model, pruned before or not, on any device.
        plan: What to keep.

    Returns:
        A model in the same dtype, on the same device, in evaluation mode: of the family's own class where kept layers
        are alike and that class can express them (see ``stock.expressible``), else a ``PerLayer…ForCausalLM``.

    Raises:
        ValueError: The plan is for a model with other layers, or the architecture is not supported.
    """
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    plan.check_fits(shapes)
    weights = {name: w for name, w in model.state_dict().items() if ".layers." not in name}
    sizes: list[dict[str, int]] = []
    kept = [i for i, layer in enumerate(plan.layers) if not layer.dropped]
    for new, old in enumerate(kept):
        layer, shape = plan.layers[old], shapes[old]
        queries = layer.queries(shape.n_rep)
        sizes.append(dict(zip(_PER_LAYER, (len(queries), len(layer.groups), len(layer.channels)), strict=True)))
        for name, weight in decoder_layers(model)[old].state_dict().items():
            weights[f"model.layers.{new}.{name}"] = _slice(name, weight, layer, queries, shape.head_dim)
    config_class = _config_class(model.config, sizes, shapes[0])
    config = config_class(**(_fields(model, shapes[0].head_dim, kept) | _layer_fields(sizes)))
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        sliced = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    # Buffers (rotary frequencies) are not in the state dict: on the meta device they would have no values.
    sliced.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    sliced.model.rotary_emb.config = config
    sliced.load_state_dict(weights, strict=True, assign=True)
    sliced.tie_weights()
    sliced.generation_config = copy.deepcopy(model.generation_config)
    return sliced.requires_grad_(True).eval()


def _config_class(config: Any, sizes: list[dict[str, int]], shape: LayerShape) -> Any:
    """The family's own configuration where it can say what is kept, else the one for layers of their own shapes."""
    alike = all(size == sizes[0] for size in sizes)
    heads, groups = sizes[0]["num_attention_heads"], sizes[0]["num_key_value_heads"]
    if alike and heads == groups * shape.n_rep and expressible(config, groups, shape):
        return CONFIGS[family(config)]
    return CLASSES[family(config)][0]


def _slice(name: str, weight: Tensor, layer: LayerPlan, queries: list[int], head_dim: int) -> Tensor:
    """The kept part of a layer's parameter, as a copy."""
    module, _, kind = name.rpartition(".")
    projection = module.rpartition(".")[2]
    rows: Any
    if projection in ("q_proj", "o_proj"):
        rows = rows_of(queries, head_dim)
    elif projection in ("k_proj", "v_proj"):
        rows = rows_of(layer.groups, head_dim)
    elif projection in ("gate_proj", "up_proj", "down_proj"):
        rows = torch.as_tensor(layer.channels)
    else:
        return weight.clone()
    if projection in ("o_proj", "down_proj"):  # parts are columns here, and a bias belongs to all of them
        return weight.index_select(1, rows.to(weight.device)) if kind == "weight" else weight.clone()
    return weight.index_select(0, rows.to(weight.device))


def _fields(model: Any, head_dim: int, kept: list[int]) -> dict[str, Any]:
    """The configuration without shapes of layers; layer types follow the kept layers."""
    fields = global_fields(model.config)
    fields["head_dim"] = head_dim  # hidden size over heads is no longer the head's width
    fields["num_hidden_layers"] = len(kept)
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][i] for i in kept]
    return fields


def _layer_fields(sizes: list[dict[str, int]]) -> dict[str, Any]:
    """Sizes for the configuration: global ones where all layers agree, else ``per_layer_config``."""
    if all(size == sizes[0] for size in sizes):
        return dict(sizes[0])
    return {"per_layer_config": {i: dict(size) for i, size in enumerate(sizes)}}


def global_fields(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration's fields without what is about single layers, and without its identity."""
    view = copy.copy(config)
    view.per_layer_config = None  # on the copy: otherwise the global sizes cannot be read
    fields: dict[str, Any] = view.to_dict()
    return {name: value for name, value in fields.items() if name not in _IDENTITY}

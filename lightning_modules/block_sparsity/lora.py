"""Low-rank adapters over pruned weights, merged only where weights were kept.

A plain merge W + BA fills every zero again. Here W + M⊙BA is merged, before every validation and demotion, and B starts
from zero again: what is validated and saved is what the mask allows, and adapters never stray far from it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


def add_adapters(model: PreTrainedModel, matrices: Mapping[str, nn.Linear], rank: int) -> PeftModel:
    """Put adapters of a rank (scale 2, no dropout) on every pruned matrix, and freeze the rest.

    The matrices stay the same objects, inside the adapter layers.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(matrices), task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


@torch.no_grad()
def merge_masked(model: nn.Module, keep: Mapping[str, Tensor]) -> list[Any]:
    """Add M⊙BA to every adapted matrix and set B to zero.

    Args:
        model: The model inside the adapters' wrapper.
        keep: Masks by the matrices' names, on any device; a matrix without one takes the whole of BA.

    Returns:
        The adapters' parameters, whose optimizer state is now of another function.
    """
    changed: list[Any] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight
        delta = layer.get_delta_weight("default").to(weight.dtype)
        weight += delta.masked_fill_(~keep[name].to(delta.device), 0.0) if name in keep else delta
        a: Any
        b: Any
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.zero_()
        changed += [a, b]
    return changed


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a model by their own names, without adapters and what they wrap around names."""
    return {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }

"""Models so small that everything about them can be computed twice."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6},
    "qwen2": {"head_dim": 6},
    "mistral": {"head_dim": 6, "sliding_window": 7},
}


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """A random model of a family; its biases are not zero."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name] | fields))
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
        torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def ids(rows: int = 2, tokens: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 2, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    found = [ids(rows, seed=seed) for seed in range(count)]
    return [{"input_ids": one, "labels": one} for one in found]


def two_samples() -> dict[str, dict[str, torch.Tensor]]:
    """The same two samples as one packed row, and as two rows padded on the right and on the left."""
    one, two = ids(1, 9, seed=3), ids(1, 7, seed=4)
    both = torch.cat([one, two], 1)
    pad, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 7, dtype=torch.long)
    places = torch.cat([torch.arange(9), torch.arange(7)])[None]
    layouts = {"packed": {"input_ids": both, "labels": both, "position_ids": places}}
    for side in ("right", "left"):

        def padded(part: torch.Tensor, filler: torch.Tensor, side: str = side) -> torch.Tensor:
            return torch.cat([part, filler] if side == "right" else [filler, part], 1)

        layouts[side] = {
            "input_ids": torch.cat([one, padded(two, pad)]),
            "labels": torch.cat([one, padded(two, pad - 100)]),
            "attention_mask": torch.cat([torch.ones_like(one), padded(ones, pad)]),
        }
    return layouts


KEPT = [
    LayerPlan([0, 1, 2, 3], list(range(48))),
    LayerPlan([0, 2], list(range(0, 48, 2))),
    LayerPlan([1, 2, 3], list(range(16))),
    LayerPlan([3], list(range(40, 48))),
]
DROPPED = [KEPT[1], LayerPlan([], []), KEPT[2], KEPT[0]]


def plan_for(model: Any, kept: list[LayerPlan] = KEPT) -> PruningPlan:
    shapes = [shape_of(layer) for layer in decoder_layers(model)]
    return PruningPlan(list(kept), [[s.groups, s.channels] for s in shapes], "toy", model_hash(model))

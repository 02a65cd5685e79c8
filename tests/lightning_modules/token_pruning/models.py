"""Tiny random models of every supported family."""

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.token_pruning.anatomy import SUPPORTED

VOCABULARY, LAYERS, HIDDEN = 199, 6, 64
# sdpa cannot cap logits
FAMILIES = [
    (family, kernel) for family in SUPPORTED for kernel in ("sdpa", "eager") if (family, kernel) != ("gemma2", "sdpa")
]
_FIELDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    # one layer of four without experts
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": HIDDEN, "mlp_only_layers": [2]},
    "mixtral": {"num_local_experts": 4},
    # its last layer of four knows no positions
    "smollm3": {"no_rope_layer_interval": 4},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 4.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 8},
}


def build(family: str = "llama", kernel: str | None = None, layers: int = LAYERS, **fields: Any) -> Any:
    """A model with sharp enough attention that dropping a token shows; equal weights for equal arguments."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        common |= {"n_embd": HIDDEN, "n_layer": layers, "n_head": 4, "n_positions": 512}
    else:
        common |= {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 4}
        common |= {"intermediate_size": 2 * HIDDEN, "max_position_embeddings": 512}
    if family not in ("gpt2", "gpt_neox"):
        common |= {"num_key_value_heads": 2}
    if family in ("qwen3_moe", "mixtral"):
        common |= {"num_experts_per_tok": 2}
    if family.startswith("gemma"):
        common |= {"layer_types": ["full_attention"] * layers}
    common |= _FIELDS.get(family, {})
    kernel = kernel or ("eager" if family == "gemma2" else "sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**common, **fields})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


shared = functools.cache(build)
"""`build`, once per test session; for tests that leave the model as it is."""


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, the padding token excluded."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def on_disk(layers: int = LAYERS) -> dict[str, int | str]:
    """A device map of the Llama that leaves its first weights, every second layer and its head on disk."""
    places: dict[str, int | str] = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    return places | {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(layers)} | {"lm_head": "disk"}

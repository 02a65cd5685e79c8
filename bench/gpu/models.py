"""Models of random weights that checks use."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from bench.gpu.setting import Setting


def small(setting: Setting, **fields: Any) -> Any:
    """A Llama of four layers, in float32 and sharp enough in its attention that a dropped token shows."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**(sizes | heads | ends | fields))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim == 2):
            parameter.mul_(3.0)
    return model.to(setting.device)


def on_device(config: PretrainedConfig, setting: Setting) -> Any:
    """A model made without memory and then given random weights where it runs, in the setting's dtype."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    model.to_empty(device=setting.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)
        for module in model.modules():  # what is computed from the configuration has no weights to load
            if type(module).__name__.endswith("RotaryEmbedding"):
                fresh = type(module)(config)
                for name, buffer in fresh.named_buffers():
                    module.get_buffer(name).copy_(buffer)  # its own type: float32 whatever the model's
    return model.eval()

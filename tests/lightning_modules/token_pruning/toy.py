"""Tiny random models whose predictions depend on what they read."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def tiny_model(kind: str = "llama", layers: int = 4, seed: int = 0, hidden: int = 32) -> PreTrainedModel:
    """A random model of ``layers`` layers with 97 tokens, in evaluation mode, its weights frozen."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 2 * hidden, "max_position_embeddings": 512}
    if kind in ("llama", "qwen2"):
        sizes["num_key_value_heads"] = 2
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():  # random initial weights are too small for tokens to matter to each other
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.requires_grad_(False)

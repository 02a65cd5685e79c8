"""Llama, Qwen2 and Mistral whose layers differ in heads and in width, as transformers' ``per_layer_config`` describes.

transformers (5.14 and later) serialises and resolves ``per_layer_config``, but its stock models refuse it. This file
adds the modelling half and nothing else. It imports only what loading needs, because a saved model carries a copy of
it: a process without Pare loads the folder with ``trust_remote_code=True``.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

_SPEC = "_heterogeneity_spec"  # where transformers keeps per_layer_config; tests fail when an upgrade moves it


class _PerLayerConfig:
    """A configuration in which heads and widths may be given for each layer."""

    def validate_architecture(self) -> None:
        """Check every layer's heads; the stock check reads the global number, which is ambiguous here.

        Raises:
            ValueError: Query heads of a layer are not a multiple of its key-value heads, or there are none.
        """
        config: Any = self
        for i, layer in enumerate(config.per_layer_config):
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if kv_heads < 1 or heads % kv_heads:
                raise ValueError(f"layer {i}: {heads} query heads do not divide among {kv_heads} key-value heads")


class _PerLayerModel:
    """Builds every decoder layer from ``config.per_layer_config[i]``; the rest is the stock class."""

    def __init__(self, config: Any) -> None:
        # Hidden on this very object, not on a copy: the stock constructor settles the attention implementation on the
        # configuration it is given, and a copy would silently leave the model on the slow one.
        spec = config.__dict__.pop(_SPEC, None)
        try:
            super().__init__(config)  # type: ignore[call-arg]  # under from_pretrained on the meta device: free
        finally:
            if spec is not None:
                config.__dict__[_SPEC] = spec
        if spec is not None:
            model: Any = self
            layers = model.model.layers
            for i in range(config.num_hidden_layers):
                layers[i] = type(layers[i])(config.per_layer_config[i], i)
            # The layers' own copies of the configuration would not see set_attn_implementation.
            for module in layers.modules():
                if hasattr(module, "config"):
                    module.config = config
            model.post_init()


# @strict again: it lists the validators of a class once, and the parent's list has the parent's check.
@strict
class PerLayerLlamaConfig(_PerLayerConfig, LlamaConfig):
    """Llama with layers of their own shapes."""

    model_type = "per_layer_llama"


class PerLayerLlamaForCausalLM(_PerLayerModel, LlamaForCausalLM):
    """Llama with layers of their own shapes."""

    config_class = PerLayerLlamaConfig
    config: PerLayerLlamaConfig


@strict
class PerLayerMistralConfig(_PerLayerConfig, MistralConfig):
    """Mistral with layers of their own shapes."""

    model_type = "per_layer_mistral"


class PerLayerMistralForCausalLM(_PerLayerModel, MistralForCausalLM):
    """Mistral with layers of their own shapes."""

    config_class = PerLayerMistralConfig
    config: PerLayerMistralConfig


@strict
class PerLayerQwen2Config(_PerLayerConfig, Qwen2Config):
    """Qwen2 with layers of their own shapes."""

    model_type = "per_layer_qwen2"


class PerLayerQwen2ForCausalLM(_PerLayerModel, Qwen2ForCausalLM):
    """Qwen2 with layers of their own shapes."""

    config_class = PerLayerQwen2Config
    config: PerLayerQwen2Config


CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (PerLayerLlamaConfig, PerLayerLlamaForCausalLM),
    "mistral": (PerLayerMistralConfig, PerLayerMistralForCausalLM),
    "qwen2": (PerLayerQwen2Config, PerLayerQwen2ForCausalLM),
}


def register() -> None:
    """Make the auto classes know these models, and every saved one carry this file."""
    for config_class, model_class in CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")

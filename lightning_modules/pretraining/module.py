"""Pretraining of GPT-2, or any other causal architecture of transformers."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_modules.causal_lm import CausalLM
from lightning_modules.loading import load

_VOCAB_MULTIPLE = 64  # matrix products are faster when the vocabulary fills whole tiles
_GPT2_62M = {"n_layer": 12, "n_embd": 512, "n_head": 8}


class Pretraining(CausalLM):
    """Trains a causal language model from random weights.

    The vocabulary size follows the data's tokenizer, and the longest position the data's block size, unless ``config``
    names them.

    Args:
        model_type: An architecture of ``transformers.AutoConfig``: "gpt2", "llama", "qwen2", …
        config: Fields of its configuration; for GPT-2 the default is 12 layers of width 512, about 62 M parameters with
            GPT-2's own vocabulary.
        pretrained: Continue from this Hugging Face folder, GGUF file or hub name instead of random weights.
        **kwargs: Optimizer and schedule, see ``CausalLM``.
    """

    starts_sharded = True

    def __init__(
        self,
        model_type: str = "gpt2",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_type = model_type
        self.config_fields = dict(config or (_GPT2_62M if model_type == "gpt2" else {}))
        self.pretrained = pretrained

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.pretrained]

    def build_model(self) -> PreTrainedModel:
        """See ``CausalLM.build_model``; every rank draws the same weights, since all share one seed."""
        if self.pretrained is not None:
            return load(self.pretrained, **self.loading).train()
        kernel = self.loading["attention"]
        return AutoModelForCausalLM.from_config(self.architecture(), attn_implementation=kernel)

    def architecture(self) -> Any:
        """The transformers configuration, completed from the data.

        Raises:
            ValueError: Unknown ``model_type``, a field it does not have, or positions shorter than the data's blocks.
        """
        try:
            known = AutoConfig.for_model(self.model_type)
        except ValueError as error:
            raise ValueError(f"model_type {self.model_type!r} is not an architecture of transformers") from error
        unknown = [name for name in self.config_fields if not hasattr(known, name)]
        if unknown:
            raise ValueError(f"model.config has fields that {self.model_type!r} does not know: {', '.join(unknown)}")
        # GPT-2 says n_positions where others say max_position_embeddings: both must count as given
        fields = {known.attribute_map.get(name, name): value for name, value in self.config_fields.items()}
        data = self.trainer.datamodule
        if data is not None:
            defaults = {
                "vocab_size": -(-len(data.tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
                "max_position_embeddings": data.block_size,
                "bos_token_id": data.tokenizer.bos_token_id,
                "eos_token_id": data.tokenizer.eos_token_id,
            }
            fields = {known.attribute_map.get(name, name): value for name, value in defaults.items()} | fields
        config = AutoConfig.for_model(self.model_type, **fields)
        if data is not None and config.max_position_embeddings < data.block_size:
            raise ValueError(
                f"data.block_size {data.block_size} exceeds the model's {config.max_position_embeddings} positions"
            )
        return config

"""A trained model as a Hugging Face folder."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lightning_modules.card import write_card


def export(
    folder: Path,
    state_dict: dict[str, Tensor],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Write safetensors, configuration, tokenizer and model card; ``from_pretrained(folder)`` loads them.

    Args:
        folder: Where to write; see ``common.files.replacing``.
        state_dict: Weights named as in the Hugging Face model.
        config: The architecture.
        tokenizer: Saved beside the weights, so that generation needs nothing else.
        card: README.md of the folder.
        generation_config: Which tokens end a text, and what else a chat model has of it; by default what ``config``
            says.

    Raises:
        ValueError: ``state_dict`` lacks weights of the architecture, or has others.
    """
    transformers_logging.disable_progress_bar()  # a bar for one file says nothing
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    model.tie_weights()
    still_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if still_meta or unexpected:
        raise ValueError(f"weights do not fit the architecture: missing {still_meta}, unexpected {list(unexpected)}")
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, card)

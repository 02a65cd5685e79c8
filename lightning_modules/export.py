"""A trained model as a Hugging Face folder."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common.files import replacing


def export(
    folder: Path,
    state_dict: dict[str, Tensor],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Write safetensors, configuration, tokenizer and model card; ``from_pretrained(folder)`` loads them.

    The folder appears complete or not at all: it is written beside and renamed. An earlier export is replaced.

    Args:
        folder: Destination.
        state_dict: Weights named as in the Hugging Face model.
        config: The architecture.
        tokenizer: Saved beside the weights, so that generation needs nothing else.
        card: README.md of the folder.
        generation_config: Which tokens end a text, and what else a chat model has of it; by default what ``config``
            says.

    Raises:
        ValueError: ``state_dict`` lacks weights of the architecture, or has others.
        OSError: The folder cannot be written; an earlier export is still there.
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
    with replacing(folder, "model") as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(card, encoding="utf-8")

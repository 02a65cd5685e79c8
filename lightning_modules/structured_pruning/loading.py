"""Saving and loading of pruned models, and of the models to be pruned."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common.files import replacing
from lightning_modules.structured_pruning.layers import family
from lightning_modules.structured_pruning.plan import FILE, PruningPlan


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a causal language model, pruned or not, and its tokenizer.

    Args:
        path: Hugging Face folder, or hub name.
        device: Where the weights go.
        dtype: What they become.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: A folder without a model, or an architecture that structured pruning does not support.
    """
    name = checked(path)
    family(AutoConfig.from_pretrained(name))  # before any weight is read
    transformers_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def load_on_meta(path: str | Path) -> Any:
    """The model without its weights: for counting."""
    config = AutoConfig.from_pretrained(checked(path))
    family(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def checked(path: str | Path) -> str:
    """The path or hub name, as transformers wants it.

    Raises:
        ValueError: It looks like a folder, but holds no model.
    """
    name = str(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: give a Hugging Face folder, or a hub name")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"no model folder at {path}")
    return name


def save(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, card: str, plan: PruningPlan | None = None
) -> None:
    """Write safetensors, configuration, tokenizer, model card and plan; an earlier folder is replaced when complete.

    Models of the per-layer classes carry their modelling file, so that ``trust_remote_code=True`` loads them anywhere.

    Raises:
        OSError: The folder cannot be written; an earlier one is still there.
    """
    with replacing(folder, "model") as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(card, encoding="utf-8")
        if plan is not None:
            plan.save(beside / FILE)

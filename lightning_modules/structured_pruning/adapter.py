"""LoRA adapters that know which base they belong to, and the loss that follows a teacher.

An adapter on a base that it was not trained on gives neither an error nor a warning, only worse text; so every folder
carries a hash of its base's weights.

Shape legend: B sequences, T tokens, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from common.manifest import check_manifest

BASE_FILE = "base.json"
_WEIGHTS = "adapter_model.safetensors"


def attach(model: Any, config: LoraConfig, weights: dict[str, Tensor] | None = None) -> PeftModel:
    """Freeze a model and put low-rank adapters beside its projections (Hu et al., arXiv 2106.09685).

    Args:
        model: A ``PreTrainedModel``; it is changed in place.
        config: Rank, scale and projections.
        weights: Trained adapter weights by their names in an adapter file; without them the adapters change nothing.

    Raises:
        ValueError: The model has none of the projections, or the weights are not for this model and configuration.
    """
    adapted = get_peft_model(model, config)
    if weights is not None:
        try:
            unused = set_peft_model_state_dict(adapted, weights).unexpected_keys
        except RuntimeError as error:  # of another shape
            raise ValueError(f"the adapter does not fit this model: {str(error).splitlines()[-1].strip()}") from error
        missing = adapter_weights(adapted.state_dict()).keys() - weights.keys()
        if unused or missing:
            raise ValueError(f"the adapter does not fit this model, e.g. {min([*unused, *missing])}")
    return adapted


def adapter_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' part of an adapted model's state, by the names that adapter files use."""
    return {name.replace(".default.", "."): weight for name, weight in state.items() if ".lora_" in name}


def save_adapter(folder: Path, adapted: PeftModel, base: str, base_hash: str) -> None:
    """Write an adapter as peft does, and beside it what it belongs to."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the Hub about the base
    (folder / BASE_FILE).write_text(json.dumps({"base": base, "hash": base_hash}, indent=1))


def read_adapter(folder: Path, base: str, base_hash: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter for this base.

    Args:
        folder: What ``save_adapter`` wrote.
        base: Folder or hub name of the base that it is to be put on, for errors.
        base_hash: Hash of that base's weights, see ``model_hash``.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The adapter was trained on another base, or does not say on which; or a file is damaged.
    """
    made_on, made_on_hash = check_adapter(folder)
    for written in (folder, folder.parent):  # alone, or within the merged model's folder
        check_manifest(written)
    refuse_other_base(f"the adapter in {folder}", made_on, made_on_hash, base, base_hash)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False  # as saved, peft would freeze the adapters
    return config, load_file(folder / _WEIGHTS)


def check_adapter(folder: Path) -> tuple[str, str]:
    """Refuse a folder that holds no adapter of ours; reads no weights.

    Returns:
        Folder or hub name of the base that it was trained on, and the hash of that base's weights.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The adapter does not say on which base it was trained.
    """
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"adapter: {folder} has no {_WEIGHTS}; give the adapter folder that fit wrote")
    if not (folder / BASE_FILE).is_file():
        raise ValueError(f"adapter: {folder} has no {BASE_FILE}, so nothing says which base it was trained on")
    try:
        made_on = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        return str(made_on["base"]), str(made_on["hash"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"{folder / BASE_FILE} is damaged"
        raise ValueError(f"adapter: {what}, so nothing says on which base it was trained") from error


def refuse_other_base(what: str, then: str, then_hash: str, now: str, now_hash: str) -> None:
    """Raise ValueError unless the weights that something was trained on are the present ones."""
    if then_hash != now_hash:
        raise ValueError(
            f"base: {what} was trained on {then} (weights {then_hash[:12]}), and {now} has other weights "
            f"({now_hash[:12]}); give the base that it was trained on, or train an adapter for this one"
        )

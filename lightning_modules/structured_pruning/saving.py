"""Saving of pruned models; ``lightning_modules.loading`` loads them like any other."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.files import replacing
from lightning_modules.structured_pruning.plan import FILE, PruningPlan


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

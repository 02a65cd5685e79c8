"""Saving of pruned models; ``lightning_modules.loading`` loads them like any other."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.files import replacing
from lightning_modules.card import write_card
from lightning_modules.structured_pruning.plan import FILE, PruningPlan
from lightning_modules.structured_pruning.rounds import Round, save_rounds


def save(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    plan: PruningPlan | None = None,
    rounds: Sequence[Round] = (),
    inputs: Iterable[str | Path | None] = (),
    overwrite: bool = False,
) -> None:
    """Write safetensors, configuration, tokenizer, model card and plan; an earlier folder is replaced when complete.

    Models of the per-layer classes carry their modelling file, so that ``trust_remote_code=True`` loads them anywhere.

    Args:
        folder: Destination.
        model: A ``PreTrainedModel``.
        tokenizer: Its tokenizer.
        card: README.md of the folder.
        plan: What was kept, in numbers of the dense model.
        rounds: How it came about, where there were several.
        inputs: See ``files.check_output``.
        overwrite: See ``files.check_output``.

    Raises:
        OSError: The folder cannot be written; an earlier one is still there.
        ValueError: The folder is an input, or not Pare's to write.
    """
    with replacing(folder, "model", inputs, overwrite) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_card(beside, card)
        if plan is not None:
            plan.save(beside / FILE)
            save_rounds(beside, rounds)

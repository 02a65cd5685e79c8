"""Running a causal language model on a batch, wherever its tokens come from: padded, packed, on another device.

Samples that share a row are kept apart by positions alone: a token whose position is not one more than that of the
token before begins a sample, and sees nothing before itself (the packed format of transformers). Padding is then a
sample of its own. So models are given positions and no attention mask, which would hide the packed format from them.

Shape legend: B rows, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a position that is not predicted

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``labels``, int64 ``[B, T]``. Rows of one length, with padding on the right at most, need nothing
else; packed samples need ``position_ids`` ``[B, T]`` that restart with each; padding on the left needs these or an
``attention_mask`` ``[B, T]``, 1 on tokens."""


def logits(model: Any, batch: Batch, **options: Any) -> Tensor:
    """Scores ``[B, T, V]`` of a batch, as if every sample were alone; see ``outputs``."""
    scores: Tensor = outputs(model, batch, **options).logits
    return scores


def outputs(model: Any, batch: Batch, **options: Any) -> Any:
    """What a model returns for a batch, as if every sample were alone.

    Args:
        model: A causal language model of transformers, also wrapped or spread over devices.
        batch: On any device.
        **options: Further arguments of the model, such as ``logits_to_keep`` or ``output_hidden_states``.

    Returns:
        Transformers' output with ``logits [B, T, V]`` and, where asked for, ``hidden_states`` ``[B, T, H]`` each.
    """
    inputs = {"input_ids": batch["input_ids"]}
    positions = positions_of(batch)
    if positions is not None:
        inputs["position_ids"] = positions
    if not hasattr(model, "hf_device_map"):  # where there is one, its hooks move what they are given
        device = next(model.parameters()).device
        inputs = {name: part.to(device) for name, part in inputs.items()}
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    flat = positions is not None and "flash" in str(kernel)
    if flat:  # flash attention keeps samples apart in one row only
        inputs = {name: part.reshape(1, -1) for name, part in inputs.items()}
    found = model(**inputs, use_cache=False, **options)
    if flat and found.logits.shape[1] == inputs["input_ids"].shape[1]:
        found.logits = found.logits.view(*batch["input_ids"].shape, -1)
        if (states := getattr(found, "hidden_states", None)) is not None:
            found.hidden_states = tuple(state.view(*batch["input_ids"].shape, -1) for state in states)
    return found


def positions_of(batch: Batch) -> Tensor | None:
    """Position of every token in its sample, int64 ``[B, T]``; None where a row's are 0, 1, 2, …."""
    mask = batch.get("attention_mask")
    if "position_ids" in batch or mask is None:
        return batch.get("position_ids")
    left = mask.long().argmax(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - left).clamp_min(0)


def labels(batch: Batch) -> Tensor:
    """What is to be predicted, int64 ``[B, T]``: no padding, and no first token of a sample, which follows nothing."""
    found, mask, positions = batch["labels"], batch.get("attention_mask"), positions_of(batch)
    if positions is not None:
        found = found.masked_fill(torch.diff(positions, prepend=positions[:, :1]) != 1, IGNORED)
    return found if mask is None else found.masked_fill(mask == 0, IGNORED)


def tokens_of(values: Tensor, batch: Batch) -> Tensor:
    """What stands on tokens, without padding: ``[B, T, F]`` to ``[n, F]``."""
    mask = batch.get("attention_mask")
    flat = values.flatten(0, 1)
    return flat if mask is None else flat[mask.to(values.device).bool().flatten()]

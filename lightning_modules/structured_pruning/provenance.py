"""Hashes that tie scores, plans, adapters and checkpoints to the weights they were made from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.batches import Batch

_CHUNK = 1 << 26  # bytes moved to the CPU at a time


def model_hash(model: Any, widened: bool = False) -> str:
    """SHA-256 of all weights, in order of name, with their shapes and dtypes; the device does not matter.

    Tied weights count once, under the name that sorts first, so that a reloaded model has the same hash.

    Args:
        model: A model.
        widened: Hash half-precision weights as the same numbers in float32, one weight at a time.
    """
    digest, seen = hashlib.sha256(), set()
    for name, weight in sorted(model.state_dict().items()):
        if weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        if widened and weight.is_floating_point() and weight.itemsize < 4:
            weight = weight.float()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _CHUNK):
            digest.update(flat[start : start + _CHUNK].cpu().numpy())
    return digest.hexdigest()


def text_hash(batches: Sequence[Batch]) -> str:
    """SHA-256 of calibration text: tokens, and what says which count and which belong together."""
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    return settings_hash([tensors_hash({name: batch[name] for name in names if name in batch}) for batch in batches])


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, with their shapes and dtypes."""
    digest = hashlib.sha256()
    for name, part in sorted(tensors.items()):
        data = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()  # NumPy knows no bfloat16
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode() + data.tobytes())
    return digest.hexdigest()


def settings_hash(settings: Any) -> str:
    """SHA-256 of JSON-able values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

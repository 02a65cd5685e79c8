"""Backward passes of a model over batches of token ids."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from lightning_modules.batches import Batch
from lightning_modules.perplexity import batch_nll


def training_pass_seconds(model: Any, batches: Sequence[Batch]) -> float:
    """Wall-clock seconds of one plain forward and backward pass with gradients of all weights, over all batches."""
    started = time.perf_counter()
    for batch in batches:
        backward(model, batch)
        model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def backward(model: Any, batch: Batch) -> None:
    """One forward and backward pass of the mean next-token loss."""
    nll, tokens = batch_nll(model, batch)
    (nll / tokens.clamp_min(1)).backward()

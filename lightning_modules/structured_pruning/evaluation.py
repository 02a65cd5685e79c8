"""Loss and perplexity of a model over batches of token ids."""

import resource
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lightning_modules.batches import Batch
from lightning_modules.perplexity import batch_nll, mean_nll, perplexity


def ppl(model: Any, batches: Iterable[Batch], done: Callable[[int], None] = lambda count: None) -> float:
    """Perplexity: exp of ``mean_nll``."""
    return perplexity(mean_nll(model, batches, done))


def training_pass_seconds(model: Any, batches: Sequence[Batch]) -> float:
    """Wall-clock seconds of one plain forward and backward pass with gradients of all weights, over all batches."""
    started = time.perf_counter()
    for batch in batches:
        backward(model, batch)
        model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory this process has used so far: of the GPU where one computes, else resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def backward(model: Any, batch: Batch) -> None:
    """One forward and backward pass of the mean next-token loss."""
    nll, tokens = batch_nll(model, batch)
    (nll / tokens.clamp_min(1)).backward()

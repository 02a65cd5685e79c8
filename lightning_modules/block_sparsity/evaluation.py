"""Text for scores, and perplexity outside a Trainer's loops."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.perplexity import mean_nll, perplexity


def calibration_batches(data: Any, blocks: int) -> list[Tensor]:
    """Blocks spread evenly over the training text, the same on every rank: token ids ``[B, T]`` by batches.

    Raises:
        ValueError: The training text has fewer blocks.
    """
    available = len(data.train)
    if available < blocks:
        raise ValueError(f"calibration_blocks is {blocks}, but the training text has only {available} blocks")
    chosen = [i * available // blocks for i in range(blocks)]
    return list(data.train[chosen]["input_ids"].split(data.batch_size))


def validation_perplexity(model: nn.Module, data: Any, device: torch.device) -> float:
    """Perplexity of the validation text, at the data's block size, blocks not overlapping."""
    home, training = next(model.parameters()).device, model.training
    found = perplexity(mean_nll(model.to(device).eval(), data.val_dataloader()))
    model.to(home).train(training)
    return found

"""Perplexity outside a Trainer's loops."""

from typing import Any

import torch
from torch import nn

from common.progress import stage
from lightning_modules.perplexity import mean_nll, perplexity


def validation_perplexity(model: nn.Module, data: Any, device: torch.device) -> float:
    """Perplexity of the validation text, at the data's block size, blocks not overlapping."""
    home, training = next(model.parameters()).device, model.training
    batches = data.val_dataloader()
    with stage("Perplexity", len(batches), "batches") as done:
        found = perplexity(mean_nll(model.to(device).eval(), batches, done))
    model.to(home).train(training)
    return found

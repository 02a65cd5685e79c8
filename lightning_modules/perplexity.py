"""Token-weighted loss and perplexity, in float32 at least, from logits of any dtype.

``torchmetrics.text.Perplexity`` takes a softmax, gathers and then the logarithm: one confidently wrong token makes it
infinite. Here the negative log-likelihood comes from log-softmax, and the mean is weighted by tokens.

Shape legend: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.progress import stage
from lightning_modules.batches import IGNORED, Batch, labels, logits


def next_token_nll(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of negative log-likelihoods of the next tokens.

    Args:
        logits_BTV: Scores; position t predicts token t + 1.
        labels_BT: Token ids, ``IGNORED`` where nothing is to be predicted.

    Returns:
        The sum in nats (float32, or float64 of such logits) and the number of predicted tokens, both 0-d.
    """
    # Shifting the labels instead of the logits avoids copying the largest tensor of the step.
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    scores = at_least_float32(logits_BTV.flatten(0, 1))
    nll = F.cross_entropy(scores, targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return nll, (targets_BT != IGNORED).sum()


def at_least_float32(scores: Tensor) -> Tensor:
    """Half-precision scores as float32; others as they are."""
    return scores.float() if scores.dtype.itemsize < 4 else scores


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite, not an error, beyond the float range; NaN of NaN."""
    return math.inf if mean_nll >= 700 else math.exp(mean_nll)


def batch_nll(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """``next_token_nll`` of a model on a batch, padded or packed; gradients flow."""
    scores = logits(model, batch)
    return next_token_nll(scores, labels(batch).to(scores.device))


@torch.no_grad()
def mean_nll(model: Any, batches: Iterable[Batch], done: Callable[[int], None] = lambda count: None) -> float:
    """Token-weighted mean negative log-likelihood, in nats per token.

    Args:
        model: A causal language model.
        batches: See ``batches.Batch``.
        done: Told the number of batches done, for progress.

    Raises:
        ValueError: There is nothing to predict.
    """
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for number, batch in enumerate(batches, 1):
        nll, tokens = batch_nll(model, batch)
        total, count = total.to(nll.device) + nll.double(), count.to(nll.device) + tokens
        done(number)
    if not count:
        raise ValueError("data: no token to predict; give more text, or a smaller block_size")
    return float(total / count)


def validation_perplexity(
    model: Any, data: Any, title: str = "Perplexity", device: torch.device | None = None
) -> float:
    """Perplexity of the validation text outside a Trainer's loops, at the data's block size, blocks not overlapping.

    Args:
        model: A causal language model; afterwards where and as it was.
        data: A DataModule, set up.
        title: What the progress is shown as.
        device: Where to compute; where the model is, when not given.
    """
    return text_perplexity(model, data.val_dataloader(), title, device)


def text_perplexity(
    model: Any, batches: Collection[Batch], title: str = "Perplexity", device: torch.device | None = None
) -> float:
    """The same of other text."""
    home, training = next(model.parameters()).device, model.training
    try:
        with stage(title, len(batches), "batches") as done:
            return perplexity(mean_nll(model.to(device or home).eval(), batches, done))
    finally:
        model.to(home).train(training)

"""Token-weighted loss and perplexity, in float32 from logits of any dtype.

``torchmetrics.text.Perplexity`` takes a softmax, gathers and then the logarithm: one confidently wrong token makes it
infinite. Here the negative log-likelihood comes from log-softmax, and the mean is weighted by tokens.

Shape legend: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that is not predicted


def next_token_nll(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of negative log-likelihoods of the next tokens.

    Args:
        logits_BTV: Scores; position t predicts token t + 1.
        labels_BT: Token ids, ``IGNORED`` where nothing is to be predicted.

    Returns:
        The sum in nats (float32) and the number of predicted tokens, both 0-d.
    """
    # Shifting the labels instead of the logits avoids copying the largest tensor of the step.
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    nll = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return nll, (targets_BT != IGNORED).sum()


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite, not an error, beyond the float range."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


@torch.no_grad()
def mean_nll(
    model: Any, batches: Iterable[dict[str, Tensor]], done: Callable[[int], None] = lambda count: None
) -> float:
    """Token-weighted mean negative log-likelihood, in nats per token.

    Args:
        model: A causal language model.
        batches: ``{"input_ids": [B, T], "labels": [B, T]}``.
        done: Told the number of batches done, for progress.

    Raises:
        ValueError: There is nothing to predict.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    for number, batch in enumerate(batches, 1):
        logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits
        nll, tokens = next_token_nll(logits, batch["labels"].to(device))
        total += nll.double()
        count += tokens
        done(number)
    if not count:
        raise ValueError("data: no token to predict; give more text, or a smaller block_size")
    return float(total / count)

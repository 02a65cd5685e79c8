"""What the scorers are trained on.

Shape legend: B sequences, N tokens, V vocabulary, P sampled pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(target_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Each row to mean 0 and standard deviation 1 over its valid tokens; 0 elsewhere, and where all are equal.

    Equal means up to float32's rounding. The gradient is finite everywhere.
    """
    count = valid_BN.sum(1, keepdim=True).clamp_min(1)
    target = target_BN.masked_fill(~valid_BN, 0.0)
    centred = (target - target.sum(1, keepdim=True) / count).masked_fill(~valid_BN, 0.0)
    variance = centred.square().sum(1, keepdim=True) / count
    # relative, for targets may be as small as 1e-8; 0 never enters the root, whose slope there is infinite
    differ = variance > (1e-6 * target.detach().abs().amax(1, keepdim=True)).square()
    return torch.where(differ, centred / torch.where(differ, variance, 1.0).sqrt(), 0.0)


def regression(scores_BN: Tensor, target_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Mean squared error over valid tokens (SDTP's MSE loss), 0 where there are none."""
    squared = (scores_BN - target_BN).square().masked_fill(~valid_BN, 0.0)
    return squared.sum() / valid_BN.sum().clamp_min(1)


def ranking(scores_BN: Tensor, target_BN: Tensor, valid_BN: Tensor, pairs: int) -> Tensor:
    """Logistic ranking loss of SDTP on sampled pairs: mean of log(1 + exp(−(sᵢ − sⱼ)·sign(tᵢ − tⱼ))).

    Args:
        scores_BN: Predicted.
        target_BN: Saliency; ties say nothing and are skipped.
        valid_BN: Tokens that pairs are drawn from.
        pairs: Pairs per row, drawn with replacement from torch's generator.

    Returns:
        0-d; 0 where every pair is a tie.
    """
    rows = valid_BN.any(1)
    if not rows.any():
        return scores_BN.sum() * 0
    first, second = torch.multinomial(valid_BN[rows].float(), 2 * pairs, replacement=True).chunk(2, dim=1)
    scores, target = scores_BN[rows], target_BN[rows]
    order = (target.gather(1, first) - target.gather(1, second)).sign()
    gap = scores.gather(1, first) - scores.gather(1, second)
    told = order != 0
    return (F.softplus(-gap * order) * told).sum() / told.sum().clamp_min(1)


def cross_entropy(scores_BN: Tensor, target_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Cross entropy of the softmax of scores from the target's shares, mean over rows, in nats.

    Args:
        scores_BN: Predicted, as logits.
        target_BN: Saliency; what is below 0 counts as 0.
        valid_BN: Tokens that both distributions are over.

    Returns:
        0-d; rows whose target is 0 everywhere are left out.
    """
    wanted = target_BN.clamp_min(0.0).masked_fill(~valid_BN, 0.0)
    total = wanted.sum(1, keepdim=True)
    predicted = scores_BN.masked_fill(~valid_BN, torch.finfo(scores_BN.dtype).min).log_softmax(1)
    nats = -(wanted / total.clamp_min(1e-30) * predicted.masked_fill(~valid_BN, 0.0)).sum(1)
    return nats.sum() / (total > 0).sum().clamp_min(1)


def kept_share(scores_BN: Tensor, valid_BN: Tensor, share_B: Tensor) -> Tensor:
    """Ratio loss of DynamicViT (arXiv 2106.02034): squared distance of the mean of sigmoid(score) from a row's share.

    It places the cut at score 0, so that a score means the same in every prompt.
    """
    mean = torch.sigmoid(scores_BN).masked_fill(~valid_BN, 0.0).sum(1) / valid_BN.sum(1).clamp_min(1)
    return (mean - share_B).square().mean()

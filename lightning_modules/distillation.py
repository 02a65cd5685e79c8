"""Learning from another model: how far its next-token distributions are.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.batches import IGNORED, Batch, labels, logits
from lightning_modules.perplexity import at_least_float32, next_token_nll


class Losses(NamedTuple):
    """Losses of a student, 0-d, in nats per predicted token.

    Attributes:
        mixture: What is minimised: (1 − weight) · text + weight · divergence.
        text: Cross entropy on the text alone.
        divergence: From the teacher, see ``divergence``.
    """

    mixture: Tensor
    text: Tensor
    divergence: Tensor


def distilled_loss(student: Any, teacher: Any, batch: Batch, weight: float, temperature: float = 1.0) -> Losses:
    """Learn from the text and from a teacher.

    Args:
        student: The model that learns.
        teacher: Gets no gradients.
        batch: Text, also padded or packed.
        weight: Share of the teacher, from 0 to 1.
        temperature: See ``divergence``.
    """
    scores = logits(student, batch)
    with torch.no_grad():
        wanted = logits(teacher, batch).to(scores.device)
    predicted = labels(batch).to(scores.device)
    nll, tokens = next_token_nll(scores, predicted)
    text, distance = nll / tokens.clamp_min(1), divergence(scores, wanted, predicted, temperature)
    return Losses((1 - weight) * text + weight * distance, text, distance)


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence of the student's next-token distribution from the teacher's, times temperature squared.

    Hinton et al., arXiv 1503.02531: the factor keeps the size of the gradient independent of the temperature.

    Args:
        student_BTV: Scores; position t predicts token t + 1.
        teacher_BTV: The teacher's scores.
        labels_BT: Token ids, ``IGNORED`` where nothing is to be learnt.
        temperature: Divides both scores.

    Returns:
        0-d, float32 at least, in nats per predicted token; 0 where nothing is predicted.
    """
    counts_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED) != IGNORED
    softened = (at_least_float32(scores) / temperature for scores in (student_BTV, teacher_BTV))
    student, teacher = (scores.log_softmax(-1) for scores in softened)
    divergence_BT = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    total = torch.where(counts_BT, divergence_BT, 0.0).sum()
    return total * temperature**2 / counts_BT.sum().clamp_min(1)

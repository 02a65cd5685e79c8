"""Learning from another model: how far its next-token distributions are.

Shape legend: B sequences, T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.batches import IGNORED, Batch, labels, outputs
from lightning_modules.perplexity import at_least_float32, next_token_nll


class Losses(NamedTuple):
    """Losses of a student, 0-d, in nats per predicted token.

    Attributes:
        mixture: What is minimised: (1 − weight) · text + weight · divergence + hidden_weight · hidden.
        text: Cross entropy on the text alone.
        divergence: From the teacher, see ``divergence``.
        hidden: Distance of hidden states from the teacher's, see ``hidden_distance``; None where it does not count.
    """

    mixture: Tensor
    text: Tensor
    divergence: Tensor
    hidden: Tensor | None = None


def distilled_loss(
    student: Any,
    teacher: Any,
    batch: Batch,
    weight: float,
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    pairs: Sequence[tuple[int, int]] = (),
) -> Losses:
    """Learn from the text and from a teacher.

    Args:
        student: The model that learns.
        teacher: Gets no gradients.
        batch: Text, also padded or packed.
        weight: Share of the teacher, from 0 to 1.
        temperature: See ``divergence``.
        hidden_weight: Weight of the distance of hidden states; 0 leaves them out.
        pairs: Which of the student's hidden states is to be like which of the teacher's, by their places in what
            transformers returns: place i is what enters layer i, the last is what the head reads.
    """
    states: dict[str, Any] = {"output_hidden_states": True} if hidden_weight else {}
    found = outputs(student, batch, **states)
    with torch.no_grad():
        wanted = outputs(teacher, batch, **states)
    scores = found.logits
    predicted = labels(batch).to(scores.device)
    nll, tokens = next_token_nll(scores, predicted)
    text = nll / tokens.clamp_min(1)
    distance = divergence(scores, wanted.logits.to(scores.device), predicted, temperature)
    mixture = (1 - weight) * text + weight * distance
    if not hidden_weight:
        return Losses(mixture, text, distance)
    counts_BT = _counts(predicted)
    between = [
        hidden_distance(found.hidden_states[i], wanted.hidden_states[j].to(scores.device), counts_BT) for i, j in pairs
    ]
    hidden = torch.stack(between).mean()
    return Losses(mixture + hidden_weight * hidden, text, distance, hidden)


def hidden_distance(student_BTH: Tensor, teacher_BTH: Tensor, counts_BT: Tensor) -> Tensor:
    """Mean over tokens of ‖s − t‖² / ‖t‖²: relative, so that the few tokens with huge states do not decide.

    Args:
        student_BTH: Hidden states.
        teacher_BTH: The teacher's.
        counts_BT: Which tokens count.

    Returns:
        0-d, float32 at least; 0 where nothing counts.
    """
    student, teacher = at_least_float32(student_BTH), at_least_float32(teacher_BTH)
    share_BT = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
    return torch.where(counts_BT, share_BT, 0.0).sum() / counts_BT.sum().clamp_min(1)


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
    counts_BT = _counts(labels_BT)
    softened = (at_least_float32(scores) / temperature for scores in (student_BTV, teacher_BTV))
    student, teacher = (scores.log_softmax(-1) for scores in softened)
    divergence_BT = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    total = torch.where(counts_BT, divergence_BT, 0.0).sum()
    return total * temperature**2 / counts_BT.sum().clamp_min(1)


def _counts(labels_BT: Tensor) -> Tensor:
    """Which positions predict something: those before a label that counts."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED) != IGNORED

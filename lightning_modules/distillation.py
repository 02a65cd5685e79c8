"""Learning from another model: how far its next-token distributions are.

Shape legend: B sequences, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.perplexity import IGNORED


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence of the student's next-token distribution from the teacher's, times temperature squared.

    Hinton et al., arXiv 1503.02531: the factor keeps the size of the gradient independent of the temperature.

    Args:
        student_BTV: Scores; position t predicts token t + 1.
        teacher_BTV: The teacher's scores.
        labels_BT: Token ids, ``IGNORED`` where nothing is to be learnt.
        temperature: Divides both scores.

    Returns:
        0-d, float32, in nats per predicted token; 0 where nothing is predicted.
    """
    counts_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED) != IGNORED
    student, teacher = ((scores.float() / temperature).log_softmax(-1) for scores in (student_BTV, teacher_BTV))
    divergence_BT = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    total = torch.where(counts_BT, divergence_BT, 0.0).sum()
    return total * temperature**2 / counts_BT.sum().clamp_min(1)

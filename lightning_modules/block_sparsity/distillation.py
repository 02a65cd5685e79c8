"""Learning from the dense model while learning from the text.

Shape legend: B sequences, T tokens, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from lightning_modules.perplexity import IGNORED, next_token_nll


def distilled_loss(logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(1 − weight)·cross-entropy + weight·KL(teacher ‖ student), means over predicted tokens. Hinton, arXiv 1503.02531.

    Returns:
        The mixed loss, and the cross-entropy alone for the log.
    """
    nll, tokens = next_token_nll(logits_BTV, labels_BT)
    counted_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED) != IGNORED
    student, teacher = logits_BTV.float().log_softmax(-1), teacher_BTV.float().log_softmax(-1)
    distance_BT = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    tokens = tokens.clamp_min(1)
    text = nll / tokens
    return (1 - weight) * text + weight * (distance_BT * counted_BT).sum() / tokens, text.detach()

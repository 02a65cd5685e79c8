"""Keep what is unlike the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer


class Duplication(Scorer):
    """Minus the greatest cosine similarity to one of a few pivot tokens; pivots themselves rank first.

    After DART (arXiv 2502.11494), which keeps pivots and drops what duplicates them. The choice of pivots matters
    little there; here they stand at even distances, so that scores do not depend on a threshold.

    Args:
        pivots: Number of pivot tokens.
    """

    def __init__(self, pivots: int = 16) -> None:
        if pivots < 1:
            raise ValueError(f"pivots must be at least 1, got {pivots}")
        self.pivots = pivots

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        rows, width = hidden_BNH.shape[:2]
        if context.real is None:
            lengths = torch.full((rows, 1), width, device=hidden_BNH.device)
        else:
            lengths = context.real.sum(-1, keepdim=True)
        steps = torch.arange(self.pivots, device=hidden_BNH.device)
        # the r-th of P pivots is token ⌊(2r+1)·n/2P⌋ of the n that are left; padding stands before them
        places_BP = width - lengths + (2 * steps + 1) * lengths // (2 * self.pivots)
        places_BP = places_BP.clamp_max(width - 1)
        unit_BNH = F.normalize(hidden_BNH.float(), dim=-1)
        pivots_BPH = unit_BNH.gather(1, places_BP[..., None].expand(-1, -1, unit_BNH.shape[-1]))
        likeness_BN = (unit_BNH @ pivots_BPH.transpose(1, 2)).amax(-1)
        return (-likeness_BN).scatter(1, places_BP, 2.0)

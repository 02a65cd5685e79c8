"""Keep tokens at even distances."""

import torch
from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer


class UniformStride(Scorer):
    """Score 1 for m of the u unprotected tokens, as evenly spaced as whole numbers allow, else 0.

    Token r = 0 … u−1 is taken where ⌊(r+1)·m/u⌋ > ⌊r·m/u⌋; m is what the budget leaves after the protected tokens.
    """

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        free = ~context.protected if context.real is None else context.real & ~context.protected
        budgets = torch.tensor(context.budgets).to(hidden_BNH.device, non_blocking=True)[:, None]
        m = budgets - context.protected.sum(-1, keepdim=True)
        u = free.sum(-1, keepdim=True).clamp_min(1)
        after = free.cumsum(-1) * m // u  # ⌊(r+1)·m/u⌋ at the free tokens
        before = (free.cumsum(-1) - 1) * m // u
        return ((after > before) & free).expand(hidden_BNH.shape[:2]).float()

"""Keep what the end of the prompt attends to."""

from typing import Self

from torch import Tensor

from lightning_modules.token_pruning.attention import tail_attention
from lightning_modules.token_pruning.scorers.base import Context, Scorer


class LastWindow(Scorer):
    """Attention that the last tokens pay in the next layer, mean over these tokens and over heads.

    The queries and keys are computed from the projections, as in SnapKV (arXiv 2404.14469) and PyramidDrop
    (arXiv 2410.17247), so that any attention kernel may run the model. `window` 1 is FastV's score
    (arXiv 2403.06764).

    Args:
        window: Tokens at the end whose attention counts.
    """

    def __init__(self, window: int = 32) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(), cls(window=1)]

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        window, real_BN = min(self.window, hidden_BNH.shape[1]), context.real
        paid_BWN = tail_attention(context.anatomy, layer + 1, hidden_BNH, window, context.rotary, real_BN)
        if real_BN is None:
            return paid_BWN.mean(1).to(hidden_BNH.device)
        asking_BW = real_BN[:, -window:].to(paid_BWN.device)  # padding inside the window of a short row asks nothing
        total_BN = (paid_BWN * asking_BW[..., None]).sum(1)
        return (total_BN / asking_BW.sum(-1, keepdim=True).clamp_min(1)).to(hidden_BNH.device)

"""Keep what the end of the prompt attends to."""

import torch
from torch import Tensor

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
    def examples(cls) -> list[Scorer]:
        """See `Scorer.examples`."""
        return [cls(), cls(window=1)]

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        parts, rotary = context.anatomy, context.rotary
        window = min(self.window, hidden_BNH.shape[1])
        last = None if rotary is None else (rotary[0][:, -window:], rotary[1][:, -window:])
        queries_BAWD = parts.queries(layer + 1, hidden_BNH[:, -window:], last)
        keys_BAND = parts.keys(layer + 1, hidden_BNH, rotary)
        groups = keys_BAND.shape[1]
        queries_BGRWD = queries_BAWD.unflatten(1, (groups, -1))  # the heads of a group share its keys
        logits = queries_BGRWD @ keys_BAND[:, :, None].transpose(-1, -2) * parts.attention(layer + 1).scaling
        return _mean_attention(logits.float(), context.real).to(hidden_BNH.device)


def _mean_attention(logits_BGRWN: Tensor, real_BN: Tensor | None) -> Tensor:
    """Softmax under the causal mask, then the mean over groups, heads and window: `[B, N]`."""
    window, width = logits_BGRWN.shape[-2:]
    future = torch.ones(window, width, dtype=torch.bool, device=logits_BGRWN.device).triu(width - window + 1)
    logits_BGRWN = logits_BGRWN.masked_fill(future, -torch.inf)
    if real_BN is None:
        return logits_BGRWN.softmax(-1).mean((1, 2, 3))
    real_BN = real_BN.to(logits_BGRWN.device)
    hidden_keys = ~real_BN[:, None, None, None, :]
    attention = logits_BGRWN.masked_fill(hidden_keys, torch.finfo(torch.float32).min).softmax(-1)
    asking = real_BN[:, None, None, -window:, None]  # padding inside the window of a short row asks nothing
    total = (attention * asking).mean((1, 2)).sum(1)
    return total / real_BN[:, -window:].sum(-1, keepdim=True).clamp_min(1)

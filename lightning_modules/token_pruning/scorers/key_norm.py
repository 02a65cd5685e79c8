"""Keep small keys."""

from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer


class KeyNorm(Scorer):
    """Score −‖k‖₂ of the key that the next layer would make, mean over its key-value heads.

    Keys of small norm attract attention (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression", arXiv 2406.11430).
    """

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        keys_BAND = context.anatomy.keys(layer + 1, hidden_BNH, rotary=None)  # rotation leaves norms alone
        return -keys_BAND.float().norm(dim=-1).mean(1)

"""Keep large hidden states."""

from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer


class HiddenNorm(Scorer):
    """Score ‖h‖₂ of a token's hidden state, in float32."""

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        return hidden_BNH.float().norm(dim=-1)

"""Keep the end of the prompt."""

from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer


class Recency(Scorer):
    """The later a token, the higher its score: a sliding window with sinks (StreamingLLM, arXiv 2309.17453)."""

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        return context.positions.float()

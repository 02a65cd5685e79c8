"""Keep or drop whole blocks of text."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.token_pruning.scorers.base import Context, Scorer
from lightning_modules.token_pruning.scorers.last_window import LastWindow


class Blocks(Scorer):
    """All tokens of a block have the mean of the scores that another scorer gives them.

    Blocks are counted from the end of the prompt, by original positions, so that they stay the same from stage to
    stage. Protected tokens and those that ask count for no mean. Where the budget ends within a block, its first tokens
    stay.

    Source: SlimInfer (arXiv 2508.06447), which prunes hidden states block by block.

    Args:
        scorer: Scores tokens.
        size: Tokens of a block.

    Raises:
        ValueError: A size below 1.
    """

    def __init__(self, scorer: Scorer, size: int = 32) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.scorer, self.size = scorer, size

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(LastWindow(window=8), 4)]

    @property
    def repeatable(self) -> bool:  # type: ignore[override]
        """See `Scorer`: as the scorer inside."""
        return self.scorer.repeatable

    @property
    def oracle(self) -> bool:  # type: ignore[override]
        """See `Scorer`: as the scorer inside."""
        return self.scorer.oracle

    @property
    def asking(self) -> int:  # type: ignore[override]
        """See `Scorer`: as the scorer inside."""
        return self.scorer.asking

    def check(self, config: Any, layers: list[int]) -> None:
        """See `Scorer.check`."""
        self.scorer.check(config, layers)

    def prepare(self, model: Any, layers: list[int]) -> None:
        """See `Scorer.prepare`."""
        self.scorer.prepare(model, layers)

    def flops(self, tokens: int, hidden_size: int) -> float:
        """See `Scorer.flops`."""
        return self.scorer.flops(tokens, hidden_size)

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`."""
        scores_BN = self.scorer.score(hidden_BNH, layer, context).to(hidden_BNH.device).float()
        places_BN = context.positions.to(scores_BN.device)
        number_BN = (places_BN[:, -1:] - places_BN) // self.size
        # counted on from 0 among the tokens that are there, so that the host need not ask how many blocks there are
        block_BN = F.pad((number_BN[:, 1:] != number_BN[:, :-1]).long().cumsum(1), (1, 0))
        left_out_BN = context.protected.to(scores_BN.device).expand_as(scores_BN).clone()
        if context.real is not None:
            left_out_BN |= ~context.real.to(scores_BN.device)
        if self.asking:
            left_out_BN[:, -self.asking :] = True
        counted_BN = (~left_out_BN).float()
        zeros = torch.zeros_like(scores_BN)
        total = zeros.scatter_add(1, block_BN, scores_BN.masked_fill(left_out_BN, 0.0))
        mean = total / zeros.scatter_add(1, block_BN, counted_BN).clamp_min(1.0)
        return torch.where(left_out_BN, scores_BN, mean.gather(1, block_BN))

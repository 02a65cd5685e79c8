"""What a token scorer is.

Shape legend: B rows, N tokens that are still there, H hidden width, D rotary width.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.variants import Variant
from lightning_modules.token_pruning.anatomy import Anatomy


@dataclass(frozen=True)
class Context:
    """What a scorer may look at besides hidden states.

    Attributes:
        anatomy: The model that is being pruned.
        positions: Places of these tokens in the padded prompt, int64 `[B, N]`, ascending.
        real: False on padding, bool `[B, N]`; None when there is none.
        protected: Tokens that stay whatever their score, bool `[B or 1, N]`.
        budgets: Tokens that will stay in each row, protected ones included.
        rotary: cos and sin `[B or 1, N, D]` of these tokens; None without rotary positions.
    """

    anatomy: Anatomy
    positions: Tensor
    real: Tensor | None
    protected: Tensor
    budgets: tuple[int, ...]
    rotary: tuple[Tensor, Tensor] | None


class Scorer(Variant):
    """Says which prompt tokens to keep.

    Attributes (of the class):
        repeatable: Equal prompts get equal scores, alone or in a padded batch.
        oracle: Looks at what comes after the prompt: a ceiling, not a method.
        pool: Width of the mean over neighbours that suits it, where the schedule names none. See `selection.pooled`.

    Attributes:
        asking: Tokens at the end of the prompt whose view the scores are, and which they therefore do not judge.
    """

    repeatable: bool = True
    oracle: bool = False
    pool: int = 1
    asking: int = 0

    @abstractmethod
    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """Score tokens by the output of a layer.

        Args:
            hidden_BNH: Output of `layer` for the tokens that are still there.
            layer: The layer after which is pruned.
            context: See `Context`.

        Returns:
            `[B, N]` of any floating type; higher means keep. What it says of padding and protected tokens is not read.
        """

    def check(self, config: Any, layers: list[int]) -> None:
        """Refuse a model by its configuration, before its weights are read.

        Raises:
            ValueError: This scorer cannot serve such a model or these layers.
        """

    def prepare(self, model: Any, layers: list[int]) -> None:
        """Get ready for a model; called before it is pruned after `layers`.

        Raises:
            ValueError: This scorer cannot serve this model or these layers.
        """

    def digest(self) -> str:
        """Of what was trained, as it was loaded: equal for equal networks and weights; empty where nothing was."""
        return ""

    def flops(self, tokens: int, hidden_size: int) -> float:
        """Floating-point operations to score so many tokens once; 0 where it is beneath counting."""
        return 0.0

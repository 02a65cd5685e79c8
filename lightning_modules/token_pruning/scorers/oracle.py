"""Scores that know the answer: ceilings to compare methods with."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.token_pruning.samples import Samples
from lightning_modules.token_pruning.scorers.base import Context, Scorer


class Oracle(Scorer):
    """A scorer that is shown prompts with their responses before it scores the prompts.

    ```python
    oracle.look(model, samples, layers)
    with PromptPruner(oracle, schedule).prefill(model):
        model(**samples.inputs())
    ```
    """

    oracle = True
    _tables: dict[int, Tensor] | None = None

    @abstractmethod
    def measure(self, model: Any, samples: Samples, layers: Sequence[int]) -> dict[int, Tensor]:
        """What each token is worth, float `[B, N]` by layer; higher means keep."""

    def look(self, model: Any, samples: Samples, layers: Sequence[int]) -> None:
        """Remember what the tokens of these samples are worth.

        Args:
            model: The model, not being pruned now.
            samples: Prompts and responses; padding on the left.
            layers: The layers after which will be pruned.
        """
        self._tables = self.measure(model, samples, layers)

    def score(self, hidden_BNH: Tensor, layer: int, context: Context) -> Tensor:
        """See `Scorer.score`.

        Raises:
            ValueError: It has not looked at this batch, or not at this layer.
        """
        table = (self._tables or {}).get(layer)
        if table is None or len(table) != len(context.positions) or table.shape[1] <= int(context.positions.max()):
            raise ValueError(f"{self!r} has not seen this batch at layer {layer}: call look(model, samples, layers)")
        return table.to(context.positions.device).gather(1, context.positions)

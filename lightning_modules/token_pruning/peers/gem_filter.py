"""The first layers choose, and the model reads what they chose from the start."""

from typing import Any, Self

from torch import Tensor

from lightning_modules.token_pruning.anatomy import Anatomy
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers.text_dropping import TextDropping
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Scorer
from lightning_modules.token_pruning.scorers.last_window import LastWindow


class GemFilter(TextDropping):
    """Re-reading: the layers up to one read the prompt, a scorer selects, the whole model reads the selection anew.

    Source: GemFilter (arXiv 2409.17422), which takes the last token's products with all keys, summed over heads, mean
    over 5 neighbours. The default is their softmax. Positions are counted anew. With `Random` or `Recency` it is their
    control at the same cost.

    Args:
        layer: The layer after which is selected.
        keep: Share of the tokens that may be dropped that is read again.
        scorer: Says which; None takes the last token's attention in the next layer, mean over heads.
        sinks: See `Schedule`.
        tail: See `Schedule`.
        min_tail: See `Schedule`.
        pool: See `Schedule`.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        layer: int,
        keep: float = 0.5,
        scorer: Scorer | None = None,
        sinks: int = 4,
        tail: float = 0.1,
        min_tail: int = 32,
        pool: int = 5,
    ) -> None:
        self.layer, self.keep, self.scorer = layer, keep, scorer or LastWindow(window=1, heads="mean")
        self.sinks, self.tail, self.min_tail, self.pool = sinks, tail, min_tail, pool
        self.schedule = Schedule([layer], keep=keep, sinks=sinks, tail=tail, min_tail=min_tail, pool=pool)
        self._pruner = PromptPruner(self.scorer, self.schedule)

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(1, min_tail=8), cls(2, keep=0.3, scorer=LastWindow(window=8), tail=0.0, min_tail=8, pool=1)]

    def check(self, config: Any) -> None:
        """See `Peer.check`; the layer must be one of the model's."""
        self._pruner.check(config)

    def choose(self, model: Any, parts: Anatomy, ids_1N: Tensor) -> Tensor:
        """See `TextDropping.choose`."""
        with self._pruner.prefill(model) as run:
            # registered after the pruner's own hook, so that it has chosen
            handle = parts.layers[self.layer + 1].register_forward_pre_hook(_stop)
            try:
                parts.decoder(input_ids=ids_1N, use_cache=False)
            except _ChosenError:
                pass
            finally:
                handle.remove()
        return run.stages[0].index[0]

    def choosing(self, cost: Cost, length: int) -> float:
        """See `TextDropping.choosing`: the first layers, and the scorer."""
        first, layers = self.layer + 1, len(cost.linear)
        read = cost.prefill([length] * first + [0] * (layers - first)) - cost.head
        return read + self.scorer.flops(length, cost.hidden_size)


class _ChosenError(Exception):
    """No later layer has to run."""


def _stop(*_: Any) -> None:
    raise _ChosenError

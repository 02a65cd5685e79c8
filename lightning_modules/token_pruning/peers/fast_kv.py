"""Two budgets: tokens are dropped once, and every head keeps some cache entries of what is left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from lightning_modules.token_pruning.anatomy import Anatomy
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers.base import Peer, Reading
from lightning_modules.token_pruning.peers.cache_selection import CacheSelection, Selecting
from lightning_modules.token_pruning.peers.snap_kv import SnapKV
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.base import Scorer
from lightning_modules.token_pruning.scorers.last_window import LastWindow


class FastKV(Peer):
    """Drops tokens once, after one layer, as `PromptPruner` does, and selects the cache of all layers head by head.

    The cache's budget counts entries of the whole prompt, so that layers before and after hold as many; a layer that
    was left fewer tokens keeps all of them. Positions are the original ones.

    Source: FastKV (arXiv 2502.01068), which reads the scores of both off the same layer: the last 8 tokens' attention,
    mean over 7 neighbours.

    Args:
        layer: The layer after which tokens are dropped.
        keep: Share of the tokens that may be dropped that later layers read.
        cache: Selects the cache of every layer; None takes `SnapKV` with a window of 8, a kernel of 7, and a fifth
            of the prompt.
        scorer: Says which tokens are dropped; None takes the last 8 tokens' attention, mean over heads.
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
        cache: CacheSelection | None = None,
        scorer: Scorer | None = None,
        sinks: int = 4,
        tail: float = 0.1,
        min_tail: int = 32,
        pool: int = 7,
    ) -> None:
        self.layer, self.keep, self.cache = layer, keep, cache or SnapKV(keep=0.2, window=8, kernel=7)
        self.scorer = scorer or LastWindow(window=8, heads="mean")
        self.sinks, self.tail, self.min_tail, self.pool = sinks, tail, min_tail, pool
        self.schedule = Schedule([layer], keep=keep, sinks=sinks, tail=tail, min_tail=min_tail, pool=pool)
        self._pruner = PromptPruner(self.scorer, self.schedule)

    @classmethod
    def examples(cls) -> list[Self]:
        """See `Variant.examples`."""
        return [cls(1, min_tail=8), cls(2, 0.3, SnapKV(0.6, 4, 1), tail=0.0, min_tail=8)]

    def check(self, config: Any) -> None:
        """See `Peer.check`; the layer must be one of the model's."""
        self._pruner.check(config)

    def entries(self, length: int, layers: int) -> list[int]:
        """See `Peer.entries`."""
        most = self.cache.budget(length)
        return [min(most, tokens) for tokens in self.schedule.lengths(length, layers)]

    def bound(self, cost: Cost, length: int) -> float:
        """See `Peer.bound`: that of the tokens that were dropped."""
        return cost.bound(length, self.schedule, self.scorer)

    def reading(self, model: Any, parts: Anatomy) -> Selecting:
        """See `Peer.reading`."""
        return Selecting(type(self).__name__, self.cache, parts)

    @contextmanager
    def prefill(self, model: Any) -> Iterator[Reading]:
        """See `Peer.prefill`."""
        # the selection's hook on the decoder comes first: of later steps the pruner sees no mask that counts the whole
        with super().prefill(model) as run, self._pruner.prefill(model):
            yield run

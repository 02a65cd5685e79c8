"""Key-value selection: the model reads the whole prompt, and each key-value head keeps some entries of its cache.

That saves memory and time of decoding, and no time of prefill.

Shape legend: N tokens that a layer has read, K entries that stay, H hidden width, A query heads, G key-value heads, R
query heads that share one, D width of a head.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.token_pruning.anatomy import Anatomy, Rotary
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers.base import Peer, Reading
from lightning_modules.token_pruning.selection import select, take


@dataclass(frozen=True)
class Seen:
    """What one layer has read.

    Attributes:
        parts: The model.
        layer: Index of the layer.
        hidden_1NH: Its input.
        rotary: cos and sin `[1, N, R]` of the tokens; None without rotary positions.
        keys_GND: Its cache.
        values_GND: Its cache.
        length: Tokens of the whole prompt, N unless some were dropped before this layer.
    """

    parts: Anatomy
    layer: int
    hidden_1NH: Tensor
    rotary: Rotary | None
    keys_GND: Tensor
    values_GND: Tensor
    length: int


class CacheSelection(Peer):
    """Chooses the cache entries that stay, for each key-value head of each layer, by equal budgets.

    Attributes:
        keep: Share of the prompt's entries that stay in every layer.
    """

    @property
    def first(self) -> int:
        """Tokens at the start that always stay."""
        return 0

    @property
    def last(self) -> int:
        """Tokens at the end that always stay."""
        return 0

    @abstractmethod
    def scores(self, seen: Seen) -> Tensor:
        """Score entries.

        Returns:
            `[G, N]`; higher means keep. What it says of the `first` and `last` tokens is not read.
        """

    def budget(self, length: int) -> int:
        """Entries that stay of a prompt of so many tokens.

        Raises:
            ValueError: Fewer than what always stays.
        """
        wanted = max(1, ceil(self.keep * length - 1e-9))
        if wanted < min(length, self.first + self.last):
            raise ValueError(
                f"{type(self).__name__}: keep {self.keep:g} of a prompt of {length} tokens is {wanted} entries, fewer "
                f"than the {self.first + self.last} that always stay; raise keep"
            )
        return wanted

    def entries(self, length: int, layers: int) -> list[int]:
        """See `Peer.entries`."""
        return [self.budget(length)] * layers

    def bound(self, cost: Cost, length: int) -> float:
        """1: all layers read the whole prompt. See `Peer.bound`."""
        return 1.0

    def reading(self, model: Any, parts: Anatomy) -> "Selecting":
        """See `Peer.reading`."""
        return Selecting(type(self).__name__, self, parts)


class Selecting(Reading):
    """Cuts the cache of each layer as soon as it has read the prompt.

    Attributes:
        kept: The entries that each layer kept of the latest prompt, int64 `[G, K]` among those that it read, by layer.
    """

    def __init__(self, name: str, peer: CacheSelection, parts: Anatomy) -> None:
        super().__init__(name, parts)
        self.peer, self.kept = peer, dict[int, Tensor]()

    def hooks(self) -> list[Any]:
        """See `Reading.hooks`."""
        layers = enumerate(self.parts.layers)
        return super().hooks() + [
            layer.register_forward_hook(self._after(index), with_kwargs=True) for index, layer in layers
        ]

    def begin(self, call: dict[str, Any]) -> None:
        """See `Reading.begin`."""
        self.peer.budget(self.length)
        self.kept = {}

    def _after(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], __: Any) -> None:
            call = dict(zip(self.parts.arguments, args, strict=False)) | kwargs
            cache = call.get(self.parts.cache_argument)
            if self.reads_prompt and not self._busy and cache is not None:
                self._cut(index, call["hidden_states"], call.get("position_embeddings"), cache.layers[index])

        return hook

    @torch.no_grad()
    def _cut(self, index: int, hidden_1NH: Tensor, rotary: Rotary | None, cached: Any) -> None:
        keys, values = cached.keys[0], cached.values[0]
        width, budget = keys.shape[1], self.peer.budget(self.length)
        if width <= budget:
            return
        scores = self.peer.scores(Seen(self.parts, index, hidden_1NH, rotary, keys, values, self.length))
        protected = torch.zeros(1, width, dtype=torch.bool, device=scores.device)
        protected[:, : self.peer.first] = True
        protected[:, width - self.peer.last :] = True
        chosen, _ = select(scores, [budget] * len(scores), protected)
        cached.keys, cached.values = take(keys, chosen)[None], take(values, chosen)[None]
        self.kept[index] = chosen


def check_keep(keep: float) -> None:
    """Refuse a share outside (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be within (0, 1], got {keep}")

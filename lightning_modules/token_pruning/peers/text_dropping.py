"""Text dropping: tokens leave the prompt before the first layer, and the model reads what is left.

Shape legend: N tokens of the prompt, K that stay.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_modules.token_pruning.anatomy import Anatomy
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.peers.base import Peer, Reading
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.selection import pooled, put, select


class TextDropping(Peer):
    """Chooses the tokens that the model reads.

    Attributes:
        schedule: The budget, that of its first stage, and what always stays.
        renumbers: Whether the tokens that stay are read as a text of their own, positions anew; else each keeps its
            position.
    """

    schedule: Schedule
    renumbers: bool = True

    @abstractmethod
    def choose(self, model: Any, parts: Anatomy, ids_1N: Tensor) -> Tensor:
        """Places of the tokens that stay, int64 `[K]`, ascending; called where there is something to drop."""

    @abstractmethod
    def choosing(self, cost: Cost, length: int) -> float:
        """Operations of `choose`.

        Args:
            cost: Of the model that reads the rest.
            length: Tokens of the prompt.
        """

    def best(self, scores_N: Tensor) -> Tensor:
        """Places of the best-scored tokens under the schedule, pooled as it says; see `selection`."""
        length = len(scores_N)
        protected = self.schedule.protected(length).to(scores_N.device)[None]
        smooth = pooled(scores_N[None], self.schedule.pool or 1, protected)
        return select(smooth, [self.schedule.budget(0, length)], protected)[0][0]

    def entries(self, length: int, layers: int) -> list[int]:
        """See `Peer.entries`."""
        return [self.schedule.budget(0, length)] * layers

    def bound(self, cost: Cost, length: int) -> float:
        """See `Peer.bound`."""
        layers, left = len(cost.linear), self.schedule.budget(0, length)
        if left == length:
            return 1.0
        whole = cost.prefill([length] * layers)
        return whole / (self.choosing(cost, length) + cost.prefill([left] * layers))

    def reading(self, model: Any, parts: Anatomy) -> "Shortened":
        """See `Peer.reading`."""
        return Shortened(self, model, parts)


class Shortened(Reading):
    """Hands the decoder a shorter prompt, and puts what it returns back to its places.

    Attributes:
        kept: Places of the latest prompt's tokens that were read, int64 `[K]`.
    """

    def __init__(self, peer: TextDropping, model: Any, parts: Anatomy) -> None:
        super().__init__(type(peer).__name__, parts)
        self.peer, self.model, self.renumbers = peer, model, peer.renumbers
        self.kept = torch.arange(0)

    def hooks(self) -> list[Any]:
        """See `Reading.hooks`."""
        if self.renumbers:
            return super().hooks()
        return super().hooks() + [
            layer.register_forward_pre_hook(self._without_places, with_kwargs=True) for layer in self.parts.layers
        ]

    def begin(self, call: dict[str, Any]) -> None:
        """See `Reading.begin`."""
        ids = call.get("input_ids")
        if ids is None or call.get("inputs_embeds") is not None:
            raise ValueError(f"{self.name} drops tokens from a text: give input_ids, not inputs_embeds")
        if self.peer.schedule.budget(0, self.length) == self.length:
            self.kept = torch.arange(self.length, device=ids.device)
            return
        with self.aside():
            self.kept = self.peer.choose(self.model, self.parts, ids).to(ids.device)
        call["input_ids"] = ids[:, self.kept]
        call["position_ids"] = (torch.arange(len(self.kept), device=ids.device) if self.renumbers else self.kept)[None]
        # a mask of ones, since without one gaps between positions would be taken for the borders of packed sequences
        call["attention_mask"] = torch.ones_like(call["input_ids"])

    def end(self, output: Any) -> None:
        """See `Reading.end`; what is returned for dropped tokens is zero, and means nothing."""
        hidden_1KH = output.last_hidden_state
        output.last_hidden_state = put(hidden_1KH, self.kept[None], None, self.length)

    def _without_places(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Some kernels take gaps between positions for borders, too; rotary embeddings are made already."""
        if not self.reads_prompt or self._busy or "position_ids" not in kwargs:
            return None
        return args, kwargs | {"position_ids": None}

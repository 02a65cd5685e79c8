"""A key-value cache whose layers hold different tokens.

Shape legend: B rows, K tokens of a stage (cached prompt tokens first, then those that came later).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache


@dataclass
class Stage:
    """What is left of the prompt from one pruning point to the next.

    Attributes:
        after: The layer after which the rest was dropped.
        index: Places of the prompt tokens that are left, in the padded prompt; int64 `[B, K]`, ascending.
        mask: Which cached entries are real tokens, bool `[B, K']`, growing with the cache; None when all are.
    """

    after: int
    index: Tensor
    mask: Tensor | None

    def rows(self, chosen: Tensor) -> None:
        """Keep, repeat or reorder rows of the batch."""
        self.index = self.index.index_select(0, chosen.to(self.index.device))
        if self.mask is not None:
            self.mask = self.mask.index_select(0, chosen.to(self.mask.device))

    def grow(self, real_BT: Tensor | None, new: int, cached: int) -> None:
        """Note `new` further entries after the first `cached`; `real_BT` is False where they are padding."""
        if self.mask is None and real_BT is None:
            return
        ones = self.index.new_ones
        if self.mask is None:
            self.mask = ones(self.index.shape[0], cached, dtype=torch.bool)
        if real_BT is None:
            real_BT = ones(self.index.shape[0], new, dtype=torch.bool)
        self.mask = torch.cat([self.mask, real_BT.to(self.mask.device)], dim=1)

    def kept(self, length: int) -> Tensor:
        """Which of the prompt's `length` columns are left, bool `[B, length]`."""
        real = torch.ones_like(self.index, dtype=torch.bool)
        if self.mask is not None:
            real = self.mask[:, : self.index.shape[1]]
        return torch.zeros(len(real), length, dtype=torch.bool, device=real.device).scatter(1, self.index, real)


@dataclass
class Permit:
    """Whether the hooks that a pruned cache needs are in place."""

    open: bool = True


class PrunedCache(DynamicCache):
    """A `DynamicCache` that knows which prompt tokens each of its layers holds.

    Layer 0 is never pruned, so positions and the length that `generate` asks for are those of the whole conversation.

    Attributes:
        stages: Pruning points, first to last.
        prompt_length: Columns of the padded prompt.
        permit: Closed when the pruning context ends: without its masks later turns would be wrong, without an error.
    """

    stages: list[Stage]
    prompt_length: int
    permit: Permit

    @classmethod
    def adopt(cls, cache: Cache, prompt_length: int, stages: list[Stage], permit: Permit) -> "PrunedCache":
        """Turn an ordinary cache into a pruned one, in place: `generate` and its caller keep the same object.

        Raises:
            ValueError: Another kind of cache (static, quantised, encoder-decoder, …).
        """
        if type(cache) not in (DynamicCache, cls):
            raise ValueError(
                f"token pruning needs a DynamicCache, not {type(cache).__name__}: its layers grow unequally"
            )
        cache.__class__ = cls
        assert isinstance(cache, cls)
        cache.stages, cache.prompt_length, cache.permit = stages, prompt_length, permit
        return cache

    def stage_of(self, layer: int) -> int:
        """How many pruning points lie before a layer."""
        return sum(stage.after < layer for stage in self.stages)

    def lengths(self) -> list[int]:
        """Cached tokens of every layer (of the row that has most)."""
        return [layer.get_seq_length() for layer in self.layers]

    def bytes(self) -> int:
        """Size of all keys and values."""
        parts = [part for layer in self.layers for part in (layer.keys, layer.values)]
        return sum(part.nbytes for part in parts if part is not None)

    def update(self, *args, **kwargs):
        """Append keys and values. See `Cache.update`.

        Raises:
            RuntimeError: The pruning context has ended.
        """
        if not self.permit.open:
            raise RuntimeError("this cache was pruned: go on with it inside `with pruner.prefill(model):`")
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the beams. See `Cache.reorder_cache`."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row. See `Cache.batch_repeat_interleave`."""
        super().batch_repeat_interleave(repeats)
        for stage in self.stages:
            stage.rows(torch.arange(len(stage.index)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows. See `Cache.batch_select_indices`."""
        super().batch_select_indices(indices)
        self._rows(indices)

    def _rows(self, chosen: Tensor) -> None:
        for stage in self.stages:
            stage.rows(chosen)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. See `Cache.crop`.

        Raises:
            ValueError: They reach into the pruned prompt.
        """
        remove = abs(tokens_to_remove)
        if remove > self.get_seq_length() - self.prompt_length:
            raise ValueError(f"cannot crop {remove} tokens: that reaches into the pruned prompt")
        super().crop(tokens_to_remove)
        for stage in self.stages:
            if stage.mask is not None and remove:
                stage.mask = stage.mask[:, :-remove]

    def reset(self) -> None:
        """Empty the cache. See `Cache.reset`."""
        super().reset()
        self.stages = []

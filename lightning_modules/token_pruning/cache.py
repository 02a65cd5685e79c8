"""A key-value cache whose layers hold different tokens.

Shape legend: B rows, N tokens of a prompt, K of them that are left, T entries that a layer holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache


@dataclass
class Stage:
    """What a pruning point left of a prompt.

    Attributes:
        after: The layer after which the rest was dropped.
        index: Columns of the prompt that are left, int64 `[B, K]`.
        real: Which of them are real tokens, bool `[B, K]`: rows that keep fewer are filled up; None when all are.
    """

    after: int
    index: Tensor
    real: Tensor | None

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Keep, repeat or reorder rows of the batch."""
        self.index = change(self.index)
        self.real = None if self.real is None else change(self.real)

    def kept(self, length: int) -> Tensor:
        """Which of the prompt's `length` columns are left, bool `[B, length]`."""
        real = torch.ones_like(self.index, dtype=torch.bool) if self.real is None else self.real
        return torch.zeros(len(real), length, dtype=torch.bool, device=real.device).scatter(1, self.index, real)


@dataclass
class Stretch:
    """Where a pruned prompt lies in a cache.

    Attributes:
        start: Columns before it.
        end: Columns up to its end.
        left: Entries that each pruning point left of it.
    """

    start: int
    end: int
    left: list[int] = field(default_factory=list)


@dataclass
class Permit:
    """Whether the hooks that a pruned cache needs are in place."""

    open: bool = True

    def __deepcopy__(self, _: Any) -> "Permit":
        """Itself: the copy of a cache needs the same hooks."""
        return self


class PrunedCache(DynamicCache):
    """A `DynamicCache` that knows which tokens each of its layers holds.

    Layer 0 is never pruned, so positions and the length that `generate` asks for are those of the whole conversation.

    Attributes:
        after: The layers after which its prompts are pruned.
        masks: Which entries of the layers behind each pruning point are real tokens, bool `[B, T]`; None when all are.
        stretches: The pruned prompts, first to last.
        stages: What each pruning point left of the last of them.
        permit: Closed when the pruning context ends: without its masks later turns would be wrong, without an error.
    """

    after: list[int]
    masks: list[Tensor | None]
    stretches: list[Stretch]
    stages: list[Stage]
    permit: Permit

    @classmethod
    def check(cls, cache: Cache) -> None:
        """Refuse a cache whose layers cannot grow unequally.

        Raises:
            ValueError: Another kind of cache (static, quantised, encoder-decoder, …).
        """
        if type(cache) not in (DynamicCache, cls):
            raise ValueError(
                f"token pruning needs a DynamicCache, not {type(cache).__name__}: its layers grow unequally"
            )

    @classmethod
    def adopt(cls, cache: Cache, after: Sequence[int], mask_BT: Tensor | None) -> "PrunedCache":
        """Turn an ordinary cache into a pruned one, in place: `generate` and its caller keep the same object.

        Args:
            cache: Its entries, if it has any, stay in all layers.
            after: The layers after which prompts will be pruned.
            mask_BT: Which of its entries are real tokens; None when all are.

        Raises:
            ValueError: See `check`.
        """
        cls.check(cache)
        if not (isinstance(cache, cls) and cache.stretches):
            cache.__class__ = cls
            assert isinstance(cache, cls)
            cache.after, cache.masks, cache.stretches = list(after), [mask_BT] * len(after), []
        return cache

    def begin(self, start: int, width: int, stages: list[Stage], permit: Permit) -> None:
        """A prompt of `width` columns is being read behind `start` others; `stages` is empty, `keep` fills it."""
        self.stretches.append(Stretch(start, start + width))
        self.stages, self.permit = stages, permit

    def keep(self, stage: Stage) -> None:
        """Note what the next pruning point has left of the prompt; before its layers append that."""
        self.grow(len(self.stages), stage.real, stage.index.shape)
        self.stages.append(stage)
        self.stretches[-1].left.append(stage.index.shape[1])

    def grow(self, number: int, real: Tensor | None, shape: Sequence[int]) -> None:
        """Note entries that are about to be appended behind a pruning point.

        Args:
            number: Of the pruning point, from 0.
            real: False where they are padding, bool; None when none are.
            shape: Rows, and how many entries.
        """
        mask = self.masks[number]
        if mask is None and real is None:
            return
        if mask is None:
            assert real is not None
            mask = real.new_ones(shape[0], self.get_seq_length(self.after[number] + 1))
        new = mask.new_ones(*shape) if real is None else real.to(mask.device)
        self.masks[number] = torch.cat([mask, new], dim=1)

    def stage_of(self, layer: int) -> int:
        """How many pruning points lie before a layer."""
        return sum(after < layer for after in self.after)

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
        if self.stretches and not self.permit.open:
            raise RuntimeError("this cache was pruned: go on with it inside `with pruner.prefill(model):`")
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the beams. See `Cache.reorder_cache`."""
        super().reorder_cache(beam_idx)
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row. See `Cache.batch_repeat_interleave`."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows. See `Cache.batch_select_indices`."""
        super().batch_select_indices(indices)
        self._rows(lambda rows: rows[indices.to(rows.device)])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for stage in self.stages:
            stage.rows(change)
        self.masks = [None if mask is None else change(mask) for mask in self.masks]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. See `Cache.crop`.

        Args:
            tokens_to_remove: How many, as a negative number.

        Raises:
            ValueError: A positive number; or a part of a pruned prompt would stay: its tokens are not the same ones in
                every layer.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to forget as a negative one")
        remove = -tokens_to_remove
        length = self.get_seq_length() - remove
        if any(prompt.start < length < prompt.end for prompt in self.stretches):
            raise ValueError(f"cannot crop {remove} tokens: that reaches into the pruned prompt")
        gone = [prompt for prompt in self.stretches if length <= prompt.start]
        dropped = [0, *(sum(p.end - p.start - p.left[s] for p in gone) for s in range(len(self.after)))]
        for index, layer in enumerate(self.layers):
            layer.crop(dropped[self.stage_of(index)] - remove)
        for number, mask in enumerate(self.masks):
            if mask is not None:
                self.masks[number] = mask[:, : mask.shape[1] - remove + dropped[number + 1]]
        if gone:
            self.stretches = self.stretches[: -len(gone)]
            self.stages = []

    def reset(self) -> None:
        """Empty the cache. See `Cache.reset`."""
        super().reset()
        self.stretches, self.stages = [], []

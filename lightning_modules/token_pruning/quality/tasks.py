"""Tasks: a prompt that is pruned, and a suffix that shows what was lost with it.

Shape legend: B samples, N prompt tokens, M suffix tokens.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.samples import Samples, split_batch


class Window(NamedTuple):
    """Prompts of one length and what follows each.

    Attributes:
        prompt: int64 [B, N].
        suffix: int64 [B, M].
        labels: int64 [B, M]; ``IGNORED`` where the suffix only asks.
    """

    prompt: Tensor
    suffix: Tensor
    labels: Tensor

    def samples(self) -> Samples:
        """Prompts and suffixes in one row, as oracles look at them."""
        ids = torch.cat([self.prompt, self.suffix], 1)
        prompt = torch.zeros_like(ids, dtype=torch.bool)
        prompt[:, : self.prompt.shape[1]] = True
        labels = torch.cat([torch.full_like(self.prompt, IGNORED), self.labels], 1)
        return Samples(ids, labels, torch.ones_like(prompt), prompt)


def plain_ids(batch: Mapping[str, Tensor], task: str) -> Tensor:
    """Tokens ``[B, N]`` of a batch whose rows are text from end to end.

    Raises:
        ValueError: Rows are padded or hold several samples, whose ends are not those of the rows.
    """
    mask = batch.get("attention_mask")
    if "position_ids" in batch or (mask is not None and not bool(mask.all())):
        raise ValueError(
            f"data: {task} reads rows to their end, and these are padded or hold several samples; take plain text "
            "(--data TextCorpus), or the task response"
        )
    return batch["input_ids"]


def suffix_windows(ids: Tensor, suffix: int) -> Window:
    """The end of a text, after its beginning was pruned."""
    rest = ids[:, -suffix:]
    return Window(ids[:, :-suffix], rest, rest)


def repeated_windows(ids: Tensor, suffix: int, start: int = 16) -> Window:
    """A passage from near the start of the prompt comes again, at the end of a text that is otherwise its own.

    Args:
        ids: Blocks of text [B, T].
        suffix: Tokens of the passage, and of the suffix.
        start: Where the passage stands in the prompt; beyond the tokens that every schedule protects.

    Raises:
        ValueError: blocks too short to hold passage, suffix and something between.
    """
    check_repeatable(ids.shape[1], suffix, start)
    prompt = ids[:, :-suffix]
    passage = prompt[:, start : start + suffix]
    return Window(prompt, passage, passage)


def check_repeatable(length: int, suffix: int, start: int = 16) -> None:
    """Refuse blocks too short for ``repeated_windows``."""
    if length < start + 3 * suffix:
        raise ValueError(f"blocks of {length} tokens are too short to repeat {suffix} of them: set a longer block_size")


def response_windows(batch: dict[str, Tensor], response: int) -> Iterator[Window]:
    """Prompts and responses as the data divide them (recall, instructions), by length of the prompt."""
    samples = split_batch(batch, response)
    for row in range(len(samples.input_ids)):
        ids, labels = (part[row][samples.real[row]] for part in (samples.input_ids, samples.labels))
        begin = int(samples.prompt[row].sum())
        # in recall the question before the first answer is suffix too: it is not known while the context is read
        begin -= _QUESTION if "evidence" in batch else 0
        yield Window(ids[None, :begin], ids[None, begin:], labels[None, begin:])


_QUESTION = 1  # a key


def stack(windows: list[Window]) -> list[Window]:
    """Windows of equal lengths put together, so that they run as one batch."""
    groups: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        groups.setdefault((window.prompt.shape[1], window.suffix.shape[1]), []).append(window)
    return [Window(*(torch.cat(parts) for parts in zip(*group, strict=True))) for group in groups.values()]


def answered(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Share of labels [B, M] that the logits [B, M, V] predicting them rank first, and their number, both [B]."""
    asked = labels != IGNORED
    right = (logits.argmax(-1) == labels) & asked
    return right.sum(1), asked.sum(1)

"""Batches from memory-mapped blocks and samples."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset as ArrowDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules.data.sampler import FixedOrderSampler
from lightning_modules.perplexity import IGNORED


class Batches(Dataset[dict[str, Tensor]]):
    """Rows that are read a batch at a time.

    The index ``FixedOrderSampler.PADDING`` stands for a row that only fills up; its labels do not count.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Rows."""

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of at least ``input_ids`` and ``labels``, int64 [B, T]."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row as a batch of one."""
        return self.__getitems__([index])


class Blocks(Batches):
    """Rows of ``input_ids[block]`` that are read a batch at a time, which is several times faster than one by one.

    Args:
        rows: Memory-mapped dataset in torch format with a column ``input_ids``.
    """

    def __init__(self, rows: ArrowDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch ``{"input_ids": int64[B, T], "labels": int64[B, T]}``.

        Rows asked for as ``FixedOrderSampler.PADDING`` hold the first block, with labels that do not count.
        """
        padding = torch.tensor([index == FixedOrderSampler.PADDING for index in indices])
        input_ids = self.rows[[max(index, 0) for index in indices]]["input_ids"]
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(padding[:, None], IGNORED)}


class Windows(Batches):
    """Overlapping windows over the text of consecutive blocks, in which every token is predicted once.

    Window i begins ``stride`` tokens after window i − 1; only its last ``stride`` tokens count (all of the first), so
    each is predicted from at least ``length - stride`` tokens before it.

    Args:
        rows: Memory-mapped dataset in torch format with a column ``input_ids`` of blocks that follow each other.
        length: Tokens in a block, and in a window.
        stride: Tokens that a window adds.
    """

    def __init__(self, rows: ArrowDataset, length: int, stride: int) -> None:
        self.rows, self.length, self.stride = rows, length, stride

    def __len__(self) -> int:
        return (len(self.rows) - 1) * self.length // self.stride + 1

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch as ``Blocks`` gives it."""
        input_ids = torch.stack([self._window(max(index, 0)) for index in indices])
        labels = input_ids.clone()
        for row, index in enumerate(indices):
            seen = self.length if index == FixedOrderSampler.PADDING else self.length - self.stride if index else 0
            labels[row, :seen] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    def _window(self, index: int) -> Tensor:
        block, offset = divmod(index * self.stride, self.length)
        last = min(block + 2, len(self.rows))
        return self.rows[list(range(block, last))]["input_ids"].flatten()[offset : offset + self.length]


class Samples(Batches):
    """Rows of one sample each, or of several packed into one.

    Args:
        samples: Memory-mapped dataset in numpy format with ``input_ids``, ``prompt`` (tokens) and ``sample_id``.
        groups: The samples of every row, or None for one sample a row.
        pad_id: Token that fills short rows.
        padding_side: Where it fills them.
    """

    def __init__(
        self, samples: ArrowDataset, groups: list[list[int]] | None, pad_id: int, padding_side: Literal["left", "right"]
    ) -> None:
        self.samples, self.groups = samples, groups
        self.pad_id, self.padding_side = pad_id, padding_side

    def __len__(self) -> int:
        return len(self.samples if self.groups is None else self.groups)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch, see ``InstructData``.

        Rows asked for as ``FixedOrderSampler.PADDING`` hold the first row, with labels that do not count and -1 as id.
        """
        rows = [max(index, 0) for index in indices]
        members = [[row] if self.groups is None else self.groups[row] for row in rows]
        read = self.samples[[sample for row in members for sample in row]]
        ids, prompts = iter(read["input_ids"]), iter(read["prompt"])
        pieces = [[(next(ids), next(prompts)) for _ in row] for row in members]
        width = max(sum(len(tokens) for tokens, _ in row) for row in pieces)

        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        labels, mask, positions = (np.full_like(input_ids, fill) for fill in (IGNORED, 0, 0))
        for i, row in enumerate(pieces):
            used = sum(len(tokens) for tokens, _ in row)
            start = width - used if self.padding_side == "left" else 0
            empty = slice(0, start) if start else slice(used, width)
            positions[i, empty] = np.arange(width - used)
            for tokens, prompt in row:
                end = start + len(tokens)
                input_ids[i, start:end] = tokens
                mask[i, start:end] = 1
                positions[i, start:end] = np.arange(len(tokens))
                # The first token of a sample is nobody's next token, even where there is no prompt.
                learnt = max(int(prompt), 1)
                if indices[i] != FixedOrderSampler.PADDING:
                    labels[i, start + learnt : end] = tokens[learnt:]
                start = end
        batch = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        if self.groups is not None or self.padding_side == "left":
            batch["position_ids"] = positions
        if self.groups is None:
            padding = np.asarray(indices) == FixedOrderSampler.PADDING
            batch["sample_id"] = np.where(padding, -1, read["sample_id"])
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class ResumableLoader(DataLoader):
    """A loader that counts as resumable for Lightning, because the DataModule keeps its position."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        """Batches, from the position that holds when the first one is asked for.

        Lightning may make iterators before it restores a checkpoint, and worker processes would start to read then.
        """
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see ``OrderedData.state_dict``."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see ``OrderedData.load_state_dict``."""


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``Blocks`` already returns whole batches; loaders want something to call."""
    return batch

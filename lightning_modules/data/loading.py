"""Batches from memory-mapped blocks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset as ArrowDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules.data.sampler import FixedOrderSampler
from lightning_modules.perplexity import IGNORED


class Blocks(Dataset[dict[str, Tensor]]):
    """Rows of ``input_ids[block]`` that are read a batch at a time, which is several times faster than one by one.

    Args:
        rows: Memory-mapped dataset in torch format with a column ``input_ids``.
    """

    def __init__(self, rows: ArrowDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One block as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch ``{"input_ids": int64[B, T], "labels": int64[B, T]}``.

        Rows asked for as ``FixedOrderSampler.PADDING`` hold the first block, with labels that do not count.
        """
        padding = torch.tensor([index == FixedOrderSampler.PADDING for index in indices])
        input_ids = self.rows[[max(index, 0) for index in indices]]["input_ids"]
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(padding[:, None], IGNORED)}


class ResumableLoader(DataLoader):
    """A loader that counts as resumable for Lightning, because the DataModule keeps its position."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        """Batches, from the position that holds when the first one is asked for.

        Lightning may make iterators before it restores a checkpoint, and worker processes would start to read then.
        """
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see ``TextDataModule.state_dict``."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see ``TextDataModule.load_state_dict``."""


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``Blocks`` already returns whole batches; loaders want something to call."""
    return batch

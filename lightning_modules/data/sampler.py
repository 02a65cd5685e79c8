"""Samplers whose order is a pure function of seed and position, already divided among the ranks.

Both derive from ``DistributedSampler``, which is what they are; Lightning then leaves them alone whatever
``Trainer(use_distributed_sampler=...)`` says, where it would divide any other sampler a second time.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler


class Position(NamedTuple):
    """A place in the order of all samples."""

    seed: int
    """Seed of the order."""
    samples: int = 0
    """Samples that all ranks together have consumed."""


class ResumableSampler(DistributedSampler[int]):
    """One endless global stream of samples that any number of ranks can read from any position.

    The stream is all samples in the order of ``default_rng((seed, 0)).permutation(length)``, then all of them in the
    order of ``(seed, 1)``, and so on. Rank r of W reads the positions ``start + r``, ``start + r + W``, ... Since the
    position counts samples, a run that stops after any whole number of global batches can be continued with another
    world size or batch size, and each pass still meets every sample exactly once.

    Args:
        length: Samples in the dataset.
        num_replicas: Ranks that share the stream.
        rank: This rank.
        position: Says where to start; asked whenever iteration starts, because a Trainer makes its loaders before it
            has read the checkpoint to resume from.

    One iteration yields ``length // num_replicas`` samples (a Trainer's epoch). The samples that do not fill the last
    global batch of a Trainer's epoch are not dropped: they come first in the next.
    """

    def __init__(self, length: int, num_replicas: int, rank: int, position: Callable[[], Position]) -> None:
        super().__init__(range(length), num_replicas, rank, drop_last=True)  # type: ignore[arg-type]
        self.length, self.position = length, position

    def __len__(self) -> int:
        """Samples of this rank in one iteration."""
        return self.length // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Yield dataset indices from the present position on."""
        seed, start = self.position()
        drawn, order = -1, np.empty(0, np.int64)
        for k in range(len(self)):
            epoch, place = divmod(start + self.rank + k * self.num_replicas, self.length)
            if epoch != drawn:
                drawn, order = epoch, np.random.default_rng((seed, epoch)).permutation(self.length)
            yield int(order[place])


class FixedOrderSampler(DistributedSampler[int]):
    """Every sample once, in order, with the same number of samples on every rank.

    Rank r of W reads ``r``, ``r + W``, ... Ranks that would come out short read ``PADDING`` instead of a real sample:
    sharded models need every rank to run equally many batches, and a repeated sample would be counted twice.

    Args:
        length: Samples in the dataset.
        num_replicas: Ranks that share them.
        rank: This rank.
    """

    PADDING = -1

    def __init__(self, length: int, num_replicas: int, rank: int) -> None:
        super().__init__(range(length), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __len__(self) -> int:
        """Samples of this rank, padding included."""
        return -(-self.length // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        """Yield dataset indices, or ``PADDING``."""
        for index in range(self.rank, len(self) * self.num_replicas, self.num_replicas):
            yield index if index < self.length else self.PADDING

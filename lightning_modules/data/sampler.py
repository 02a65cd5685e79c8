"""Samplers whose order is a pure function of seed and position, already divided among the ranks.

Both derive from ``DistributedSampler``, which is what they are; Lightning then leaves them alone whatever
``Trainer(use_distributed_sampler=...)`` says, where it would divide any other sampler a second time.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

_WINDOW = 1024  # samples that are sorted by length together
_RUN = 32  # samples of similar length that stay together


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
        lengths: Length of every sample. If given, samples of similar length follow each other, so that a batch needs
            little padding: every 1,024 samples of the shuffled order are sorted by length and taken in runs of 32, and
            the runs shuffled.

    One iteration yields ``length // num_replicas`` samples (a Trainer's epoch). The samples that do not fill the last
    global batch of a Trainer's epoch are not dropped: they come first in the next.
    """

    def __init__(
        self,
        length: int,
        num_replicas: int,
        rank: int,
        position: Callable[[], Position],
        lengths: NDArray[np.integer] | None = None,
    ) -> None:
        super().__init__(range(length), num_replicas, rank, drop_last=True)  # type: ignore[arg-type]
        self.length, self.position, self.lengths = length, position, lengths

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
                drawn, order = epoch, self._order(seed, epoch)
            yield int(order[place])

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """One pass over all samples. Runs are of a fixed size: the order must not depend on batch size or ranks."""
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(self.length)
        if self.lengths is None:
            return order
        runs: list[NDArray[np.int64]] = []
        for start in range(0, self.length, _WINDOW):
            window = order[start : start + _WINDOW]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            pieces = [window[i : i + _RUN] for i in range(0, len(window), _RUN)]
            runs += [pieces[i] for i in generator.permutation(len(pieces))]
        return np.concatenate(runs)


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

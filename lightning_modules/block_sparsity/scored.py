"""Scores of one matrix, in the parts that pruning asks for: some rows, or some blocks wherever they are.

Nothing is kept: the scores of a whole matrix would be as large as the matrix, and writing and reading them takes longer
than computing again what is needed.

Shape legend: R, C rows and columns of a matrix; b side of a block; n blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.block_sparsity.tiers import Index, pad, take_blocks

Formula = Callable[[Tensor, Tensor | None], Tensor]
"""See ``Score.score``."""

NOT_FINITE = "scores are not finite; the weights or the calibration statistics have NaN or Inf"

_SLAB = {"cpu": 1 << 17}  # elements: half a megabyte stays in a core's cache; a GPU wants fewer, larger launches
_GPU_SLAB = 1 << 22


@dataclass(frozen=True)
class Scored:
    """A matrix and how its weights are scored.

    Args:
        weight: ``[R, C]``.
        formula: Its scores.
        statistic: What the formula needs to know besides: ``[R, C]``, ``[C]`` or nothing.
        row_means: ``float32 [R]``: what scores of a row are divided by; None leaves them.
    """

    weight: Tensor
    formula: Formula
    statistic: Tensor | None = None
    row_means: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """Scores of some rows, ``float32 [rows, C]``, freshly made."""
        statistic = self.statistic
        if statistic is not None and statistic.ndim == 2:
            statistic = statistic[rows]
        scores = self.formula(self.weight[rows], statistic)
        return scores if self.row_means is None else scores.div_(self.row_means[rows, None])

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Scores of all rows, some rows at a time, with which they are.

        Raises:
            ValueError: A score is NaN or infinite.
        """
        count = max(1, slab_elements(self.weight.device) // self.weight.shape[1])
        for first in range(0, len(self.weight), count):
            rows = slice(first, first + count)
            scores = self.rows(rows)
            if not scores.isfinite().all():
                raise ValueError(NOT_FINITE)
            yield rows, scores

    def blocks(self, index: Index, block: int) -> Iterator[tuple[Index, Tensor]]:
        """Scores of some blocks ``float32 [n, b, b]``, some at a time, with their index; beyond the edge anything."""
        weight = pad(self.weight, block)
        statistic = None if self.statistic is None else pad(self.statistic, block)
        means = self.row_means
        if means is not None:  # beyond the edge one, so that nothing is divided by zero
            means = F.pad(means, (0, len(weight) - len(means)), value=1.0)
        count = slab_elements(self.weight.device) // block**2
        for row, column in zip(*(places.split(count) for places in index), strict=True):
            known = statistic
            if statistic is not None and statistic.ndim == 2:
                known = take_blocks(statistic, (row, column), block)
            elif statistic is not None:
                known = _strips(statistic, column, block)[:, None]
            scores = self.formula(take_blocks(weight, (row, column), block), known)
            yield (row, column), scores if means is None else scores.div_(_strips(means, row, block)[..., None])

    def relative_to_rows(self, keep_RC: Tensor) -> "Scored":
        """The same with every score divided by the mean over what its row still has."""
        sums, counts = self._of_rows(keep_RC)
        return replace(self, row_means=(sums / counts.clamp_min(1)).clamp_min(torch.finfo(torch.float32).tiny))

    def relative_to_matrix(self, keep_RC: Tensor) -> "Scored":
        """The same with every score divided by the mean over what the matrix still has."""
        sums, counts = self._of_rows(keep_RC)
        mean = (sums.sum() / counts.sum().clamp_min(1)).clamp_min(torch.finfo(torch.float32).tiny)
        return replace(self, row_means=mean.repeat(len(sums)))

    def weighted(self, weights_R: Tensor) -> "Scored":
        """The same with the square of every score multiplied by its row's weight."""
        roots = weights_R.to(self.weight.device).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        return replace(self, row_means=roots if self.row_means is None else self.row_means * roots)

    def _of_rows(self, keep_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the scores of what each row still has, and how many these are; float32 ``[R]``."""
        sums, counts = [], []
        for rows, scores in self.slabs():
            keep = keep_RC[rows].view(torch.uint8).float()
            sums.append(scores.mul_(keep).sum(1))
            counts.append(keep.sum(1))
        return torch.cat(sums), torch.cat(counts)


def slab_elements(device: torch.device) -> int:
    """How many elements to work on at a time."""
    return _SLAB.get(device.type, _GPU_SLAB)


def _strips(vector: Tensor, places: Tensor, block: int) -> Tensor:
    """Chosen pieces ``[n, b]`` of a vector."""
    return vector.view(-1, block)[places]

"""The iterations of the scripts that this feature goes back to."""

from lightning_modules.block_sparsity.schedules.base import START, Row, Schedule

_SHARES = ((0.9, 0.1, 0.0), (0.8, 0.1, 0.1), (0.65, 0.2, 0.15), (0.5, 0.3, 0.2), (0.35, 0.45, 0.2))
_EPOCHS = (2, 2, 2, 2, 3)


class OriginalSchedule(Schedule):
    """Five iterations to 35/45/20 % dense/2:4/top-k, each followed by two epochs, the last by three.

    The same as ``configs/block_sparsity/progressive.csv``.
    """

    def iterations_in_order(self) -> list[Row]:
        """See ``Schedule.iterations_in_order``."""
        rows, before = [], START
        for (dense, mid, topk), epochs in zip(_SHARES, _EPOCHS, strict=True):
            row = Row(before.iteration + 1, dense, mid, topk, before.dense - dense, topk - before.topk, epochs)
            rows.append(row)
            before = row
        return rows

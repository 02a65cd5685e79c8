"""What a schedule is: how the tiers change from iteration to iteration, and how long each is fine-tuned."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

from common.variants import Variant
from lightning_modules.block_sparsity.demotion import Ratios

_SHARES = ("dense", "mid_2_4", "topk", "dense_to_2_4", "mid_2_4_to_topk")
_TOLERANCE = 1e-6  # how far shares may be from the sums that they must have


@dataclass(frozen=True)
class Row:
    """One iteration: shares of all blocks after it, the shares that move in it, and the epochs that follow it."""

    iteration: int
    dense: float
    mid_2_4: float
    topk: float
    dense_to_2_4: float
    mid_2_4_to_topk: float
    epochs: int

    @property
    def ratios(self) -> Ratios:
        """What the iteration ends with."""
        return Ratios(self.dense, self.mid_2_4, self.topk)


START = Row(0, 1.0, 0.0, 0.0, 0.0, 0.0, 0)
"""Before the first iteration everything is dense."""


class Schedule(Variant):
    """Iterations in order; none has more dense or fewer top-k blocks than the one before."""

    @abstractmethod
    def iterations_in_order(self) -> list[Row]:
        """The iterations, counted from 1."""

    @cached_property
    def rows(self) -> list[Row]:
        """The iterations, checked.

        Raises:
            ValueError: There is none, or one does not follow from the one before; see ``check_row``.
        """
        rows = self.iterations_in_order()
        if not rows:
            raise ValueError(f"{self!r} has no iteration")
        for before, row in zip([START, *rows], rows, strict=False):
            check_row(f"{type(self).__name__}, row {before.iteration + 1}", row, before)
        return rows

    def row(self, iteration: int) -> Row:
        """The row of an iteration, counted from 1.

        Raises:
            ValueError: There is no such iteration.
        """
        if not 1 <= iteration <= len(self.rows):
            raise ValueError(f"iteration {iteration} is not in the schedule, which has 1 to {len(self.rows)}")
        return self.rows[iteration - 1]


class Curve(Schedule):
    """Iterations whose 2:4 and top-k shares grow along a curve (``done``) to those at the end.

    Args:
        iterations: How many.
        dense: Share of dense blocks at the end.
        mid_2_4: Share of 2:4 blocks at the end.
        topk: Share of top-k blocks at the end.
        epochs: Fine-tuning after each iteration.

    Raises:
        ValueError: The shares are negative or do not sum to one, or there is no iteration.
    """

    def __init__(
        self, iterations: int = 5, dense: float = 0.35, mid_2_4: float = 0.45, topk: float = 0.2, epochs: int = 2
    ) -> None:
        if iterations < 1 or epochs < 0:
            raise ValueError(f"schedule: iterations must be at least 1 and epochs not negative: {iterations}, {epochs}")
        shares = {"dense": dense, "mid_2_4": mid_2_4, "topk": topk}
        if not min(shares.values()) >= 0 or not math.isclose(sum(shares.values()), 1, abs_tol=_TOLERANCE):
            raise ValueError(f"schedule: dense, mid_2_4 and topk must be shares that sum to 1, got {shares}")
        self.iterations, self.epochs = iterations, epochs
        self.dense = dense
        self.mid_2_4 = mid_2_4
        self.topk = topk

    def iterations_in_order(self) -> list[Row]:
        """See ``Schedule.iterations_in_order``."""
        rows, before = [], START
        for i in range(1, self.iterations + 1):
            done = self.done(i / self.iterations)
            mid, topk = self.mid_2_4 * done, self.topk * done
            dense = 1 - mid - topk
            before = Row(i, dense, mid, topk, before.dense - dense, topk - before.topk, self.epochs)
            rows.append(before)
        return rows

    @abstractmethod
    def done(self, x: float) -> float:
        """Share of the whole way that is done after the share ``x`` of the iterations: from 0 to 1, never falling."""


def check_row(place: str, row: Row, before: Row) -> None:
    """Refuse an iteration that does not follow from the one before.

    Args:
        place: Where it stands, for messages.
        row: The iteration.
        before: The one before, or ``START``.

    Raises:
        ValueError: Numbers are out of order, a share is not between 0 and 1, the three shares do not sum to one, or
            differ from those before by something else than what the row says moves; the message names the column.
    """
    if row.iteration != before.iteration + 1:
        raise ValueError(
            f"{place}, column iteration: {row.iteration} where {before.iteration + 1} is due; iterations count from 1 "
            "in order"
        )
    for column in _SHARES:
        value = getattr(row, column)
        if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
            moved = ": a block is never un-demoted" if "_to_" in column else ""
            raise ValueError(f"{place}, column {column}: {value:g} is not between 0 and 1{moved}")
    due = {
        "dense": (before.dense - row.dense_to_2_4, f"{before.dense:g} − dense_to_2_4 {row.dense_to_2_4:g}"),
        "mid_2_4": (
            before.mid_2_4 + row.dense_to_2_4 - row.mid_2_4_to_topk,
            f"{before.mid_2_4:g} + dense_to_2_4 {row.dense_to_2_4:g} − mid_2_4_to_topk {row.mid_2_4_to_topk:g}",
        ),
        "topk": (1 - row.dense - row.mid_2_4, f"1 − dense {row.dense:g} − mid_2_4 {row.mid_2_4:g}"),
    }
    for column, (value, formula) in due.items():
        if abs(getattr(row, column) - value) > _TOLERANCE:
            raise ValueError(f"{place}, column {column}: {getattr(row, column):g}, but {formula} = {value:g}")

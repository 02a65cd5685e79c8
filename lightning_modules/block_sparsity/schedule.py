"""How the tiers change from iteration to iteration, and how long each is fine-tuned."""

import csv
import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_modules.block_sparsity.demotion import Ratios

_SHARES = ("dense", "mid_2_4", "topk", "dense_to_2_4", "mid_2_4_to_topk")
COLUMNS = ("iteration", *_SHARES, "epochs")
_TOLERANCE = 1e-6


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


class Schedule(ABC):
    """Iterations in order; each ends with fewer dense and no fewer top-k blocks than the one before."""

    rows: list[Row]

    def row(self, iteration: int) -> Row:
        """The row of an iteration, counted from 1.

        Raises:
            ValueError: There is no such iteration.
        """
        if not 1 <= iteration <= len(self.rows):
            raise ValueError(f"iteration {iteration} is not in the schedule, which has 1 to {len(self.rows)}")
        return self.rows[iteration - 1]


class CsvSchedule(Schedule):
    """A schedule from a CSV file with the columns ``iteration,dense,mid_2_4,topk,dense_to_2_4,mid_2_4_to_topk,epochs``.

    The identities are checked: dense = dense before − dense_to_2_4; mid_2_4 = mid_2_4 before + dense_to_2_4 −
    mid_2_4_to_topk; the three shares sum to one; nothing moves upwards. Before the first row everything is dense.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a value is wrong; the message names row and column.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        name = Path(path).name
        if not Path(path).is_file():
            raise FileNotFoundError(f"schedule.path: no such file: {path}")
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(f"{name}: missing column {', '.join(missing)}; the columns are {','.join(COLUMNS)}")
            self.rows = [_parse(f"{name}, line {reader.line_num}", fields) for fields in reader]
        if not self.rows:
            raise ValueError(f"{name} has no iteration")
        before = Row(0, 1.0, 0.0, 0.0, 0.0, 0.0, 0)
        for number, row in enumerate(self.rows, 1):
            _check(f"{name}, row {number}", row, before)
            before = row


class CubicSchedule(Schedule):
    """Fast at first and slowly in the end: the share moved by iteration i of n is 1 − (1 − i/n)³.

    The curve of Zhu and Gupta, arXiv 1710.01878.

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
        self.rows = _along(lambda x: 1 - (1 - x) ** 3, iterations, Ratios(dense, mid_2_4, topk), epochs)


class LinearSchedule(Schedule):
    """The same share moves in every iteration.

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
        self.rows = _along(lambda x: x, iterations, Ratios(dense, mid_2_4, topk), epochs)


def _parse(place: str, fields: dict[str, str | None]) -> Row:
    numbers = {}
    for column in COLUMNS:
        try:
            numbers[column] = float(fields[column] or "")
        except ValueError:
            raise ValueError(f"{place}, column {column}: {fields[column]!r} is not a number") from None
    for column in ("iteration", "epochs"):
        if numbers[column] != int(numbers[column]):
            raise ValueError(f"{place}, column {column}: {fields[column]} is not a whole number")
    iteration, epochs = int(numbers["iteration"]), int(numbers["epochs"])
    return Row(iteration=iteration, epochs=epochs, **{name: numbers[name] for name in _SHARES})


def _check(place: str, row: Row, before: Row) -> None:
    """Raise ValueError unless ``row`` follows from ``before``."""
    if row.iteration != before.iteration + 1:
        raise ValueError(
            f"{place}, column iteration: {row.iteration} where {before.iteration + 1} is due; iterations count from 1 "
            "in order"
        )
    if row.epochs < 0:
        raise ValueError(f"{place}, column epochs: {row.epochs} is negative")
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


def _along(curve: Callable[[float], float], iterations: int, end: Ratios, epochs: int) -> list[Row]:
    """Rows whose 2:4 and top-k shares grow along a curve from 0 to 1."""
    if iterations < 1 or epochs < 0:
        raise ValueError(f"schedule: iterations must be at least 1 and epochs not negative: {iterations}, {epochs}")
    shares = vars(end)
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1, abs_tol=_TOLERANCE):
        raise ValueError(f"schedule: dense, mid_2_4 and topk must be shares that sum to 1, got {shares}")
    rows, before = [], Row(0, 1.0, 0.0, 0.0, 0.0, 0.0, 0)
    for i in range(1, iterations + 1):
        done = curve(i / iterations)
        mid, topk = end.mid_2_4 * done, end.topk * done
        dense = 1 - mid - topk
        before = Row(i, dense, mid, topk, before.dense - dense, topk - before.topk, epochs)
        rows.append(before)
    return rows

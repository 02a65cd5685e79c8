"""A schedule that somebody wrote down."""

import csv
import math
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_modules.block_sparsity.schedules.base import START, Row, Schedule, check_row

COLUMNS = tuple(field.name for field in fields(Row))
NEEDED = ("dense", "mid_2_4", "topk", "epochs")
_MOST = 1_000_000  # iterations and epochs: beyond it a number is a mistake


class CsvSchedule(Schedule):
    """A schedule from a CSV file with the columns ``dense,mid_2_4,topk,epochs``: shares after each iteration.

    It may have ``iteration,dense_to_2_4,mid_2_4_to_topk`` as well: what follows from the shares, and is checked against
    them. Empty lines, and lines that begin with ``#``, are skipped. The identities are checked: dense = dense before −
    dense_to_2_4; mid_2_4 = mid_2_4 before + dense_to_2_4 − mid_2_4_to_topk; the three shares sum to one; nothing moves
    upwards. Before the first row everything is dense.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, unknown or there twice, or a value is wrong; the message names file, row and
            column.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._read = read_rows(Path(path))  # at once: a file that changes later changes nothing

    def iterations_in_order(self) -> list[Row]:
        """See ``Schedule.iterations_in_order``."""
        return self._read

    @classmethod
    def examples(cls) -> "list[CsvSchedule]":
        """See ``Variant.examples``."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "two_iterations.csv"
            file.write_text(f"# an example\n{','.join(COLUMNS)}\n1,0.9,0.1,0,0.1,0,2\n2,0.8,0.1,0.1,0.1,0.1,1\n")
            return [cls(str(file))]


def read_rows(path: Path) -> list[Row]:
    """The iterations of a file, checked; see ``CsvSchedule``."""
    header: list[str] | None = None
    rows: list[Row] = []
    for line, values in _lines(path):
        if header is None:
            header = _header(path, line, values)
            continue
        place = f"{path.name}, row {len(rows) + 1} (line {line})"
        before = rows[-1] if rows else START
        row = _parse(place, header, values, before)
        check_row(place, row, before)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path.name} has no iteration: a line with {','.join(NEEDED)}, then one line for each")
    return rows


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Number and fields of every line that says something."""
    if not path.is_file():
        raise FileNotFoundError(f"schedule.path: no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error}); save it as CSV in UTF-8") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            (values,) = csv.reader([line], skipinitialspace=True, strict=True)
        except csv.Error as error:
            raise ValueError(f"{path.name}, line {number} cannot be read: {error}") from None
        if any(value.strip() for value in values):  # a spreadsheet writes empty rows as commas
            found.append((number, [value.strip() for value in values]))
    return found


def _header(path: Path, line: int, values: list[str]) -> list[str]:
    more = [column for column in COLUMNS if column not in NEEDED]
    wanted = f"the columns are {','.join(NEEDED)}, and possibly {','.join(more)}"
    for column in values:
        if column not in COLUMNS:
            raise ValueError(f"{path.name}, line {line}: unknown column {column!r}; {wanted}")
        if values.count(column) > 1:
            raise ValueError(f"{path.name}, line {line}: column {column} is there twice; {wanted}")
    missing = [column for column in NEEDED if column not in values]
    if missing:
        raise ValueError(f"{path.name}, line {line}: missing column {', '.join(missing)}; {wanted}")
    return values


def _parse(place: str, header: list[str], values: list[str], before: Row) -> Row:
    if len(values) != len(header):
        raise ValueError(f"{place} has {len(values)} values for {len(header)} columns")
    numbers: dict[str, float] = {}
    for column, text in zip(header, values, strict=True):
        try:
            numbers[column] = float(text)
        except ValueError:
            raise ValueError(f"{place}, column {column}: {text!r} is not a number") from None
        if not math.isfinite(numbers[column]):
            raise ValueError(f"{place}, column {column}: {text} is not a finite number")
    numbers.setdefault("iteration", before.iteration + 1.0)
    numbers.setdefault("dense_to_2_4", before.dense - numbers["dense"])
    numbers.setdefault("mid_2_4_to_topk", numbers["topk"] - before.topk)
    for column in ("iteration", "epochs"):
        if not numbers[column].is_integer() or not 0 <= numbers[column] <= _MOST:
            raise ValueError(f"{place}, column {column}: {numbers[column]:g} is not a whole number from 0 to {_MOST:,}")
    iteration, epochs = int(numbers.pop("iteration")), int(numbers.pop("epochs"))
    return Row(iteration=iteration, epochs=epochs, **numbers)

"""How columns are written: the numbers of one share their decimals, and those that hold nothing are left out."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench.report.values import Spread
from common.tables import NOT_RECORDED, Table, cell

_MOST = 4  # decimals; what is smaller than they can show is written with an exponent
Number = int | float | Spread


@dataclass(frozen=True)
class Written:
    """One cell as text: the number or words, and the standard deviation behind it ("" without)."""

    text: str
    sd: str = ""


@dataclass(frozen=True)
class Column:
    """One column as text.

    Attributes:
        header: Its name.
        numeric: Whether it holds numbers, which stand right.
        cells: A cell for each row.
    """

    header: str
    numeric: bool
    cells: list[Written]

    @cached_property
    def sd_width(self) -> int:
        """Characters of the longest standard deviation; 0 without any."""
        return max((len(one.sd) for one in self.cells), default=0)


def shown(table: Table) -> tuple[Table, list[str]]:
    """The table without the columns that hold nothing, and the names of those in which something is not recorded."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.headers))]
    kept = [i for i, values in enumerate(columns) if not i or not values or not all(map(_empty, values))]
    missing = [h for i, h in enumerate(table.headers) if i not in kept and any(value != "" for value in columns[i])]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table([table.headers[i] for i in kept], rows, table.title), missing


def written(table: Table, units: str | None = None) -> list[Column]:
    """Every column as text.

    Args:
        table: Raw values.
        units: Header of a column; decimals are then shared by the rows that agree in it.
    """
    by = list(table.headers).index(units) if units is not None and units in table.headers else None
    kinds = ["" if by is None else cell(row[by]) for row in table.rows]
    return [_column(header, [row[i] for row in table.rows], kinds) for i, header in enumerate(table.headers)]


def decimals(values: Sequence[float]) -> int | None:
    """Decimals for numbers that stand below each other; None where only exponents can show them.

    Three significant digits for the middle one and one for all but the smallest tenth, four decimals at most.
    """
    sizes = sorted(abs(value) for value in values if value and math.isfinite(value))
    if not sizes or all(float(size).is_integer() for size in sizes):
        return 0
    middle, small = (math.floor(math.log10(size)) for size in (sizes[len(sizes) // 2], sizes[len(sizes) // 10]))
    if small < -_MOST:
        return None
    return min(max(2 - middle, -small, 0), _MOST)


def number(value: float, places: int | None) -> str:
    """A number with so many decimals, or with an exponent; what would read 0 and is not is "< 0.01" or "> -0.01"."""
    if not math.isfinite(value):
        return str(value)
    if places is None:
        return f"{value:.2e}"
    shown = f"{value:,.{places}f}"
    if value and not float(shown.replace(",", "")):
        least = f"{10.0**-places:.{places}f}"
        return f"< {least}" if value > 0 else f"> -{least}"
    return shown


def shorten(value: Any) -> str:
    """About what a cell reads, for its width."""
    return (
        f"{value.mean:.4g}" + (f" ± {value.sd:.3g}" if value.sd else "") if isinstance(value, Spread) else cell(value)
    )


def _column(header: str, values: list[Any], kinds: list[str]) -> Column:
    found: dict[str, list[float]] = defaultdict(list)
    for value, kind in zip(values, kinds, strict=True):
        if _is_number(value):
            found[kind].append(value.mean if isinstance(value, Spread) else float(value))
    numbers = sum(map(len, found.values()))
    if not numbers or 2 * numbers < sum(not _empty(value) for value in values):
        return Column(header, False, [_words(value) for value in values])
    places = {kind: decimals(some) for kind, some in found.items()}
    cells = [_cell(value, places.get(kind)) for value, kind in zip(values, kinds, strict=True)]
    return Column(header, True, cells)


def _cell(value: Any, places: int | None) -> Written:
    if not _is_number(value):
        return _words(value)
    if isinstance(value, Spread):
        known = value.sd and math.isfinite(value.sd)
        return Written(number(value.mean, places), f" ± {_deviation(value.sd or 0.0, places)}" if known else "")
    return Written(number(value, places))


def _deviation(value: float, places: int | None) -> str:
    return f"{value:.2e}" if places is None else f"{value:,.{places}f}"


def _words(value: Any) -> Written:
    return Written(str(value) if isinstance(value, Spread) else cell(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _empty(value: Any) -> bool:
    return value is None or value in ("", NOT_RECORDED)

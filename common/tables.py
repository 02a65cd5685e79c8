"""One table, printed in a terminal or written as Markdown. A value that was not measured says so; it is never 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rich.markup
import rich.table

NOT_RECORDED = "not recorded"


def cell(value: Any) -> str:
    """Text of one value: numbers with four significant digits, None as "not recorded"."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        # Grouped digits are easier to compare than 1.235e+04; beyond that range the exponent is.
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or "none"
    return str(value)


def percent(share: float | None) -> str | None:
    """A fraction as "12.3 %"; None stays None."""
    return None if share is None else f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Table:
    """Headers and rows of raw values, each row as long as the headers. Rich prints it as it is."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str | None = None

    def markdown(self) -> str:
        """GitHub table; pipes and line breaks inside cells are escaped."""
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        texts = [[cell(value).replace("|", "\\|").replace("\n", "<br>") for value in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in texts) + "\n"

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title)
        for header in self.headers:
            table.add_column(rich.markup.escape(header), overflow="fold")
        for row in self.rows:
            table.add_row(*(rich.markup.escape(cell(value)) for value in row))
        return table

    def transposed(self) -> "Table":
        """Rows become columns: readable when there are many quantities and few things to compare."""
        columns = list(zip(self.headers, *self.rows, strict=True))
        return Table(columns[0], columns[1:], self.title)

"""Files of a report: the page, its tables for papers and slides, its charts; each complete or not at all."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import drawing
from bench.report.columns import shown
from bench.report.content import Chart, Section, Sheet
from bench.report.values import Spread
from common.files import replacing, write_text
from common.tables import Table


def page(path: Path, text: str) -> None:
    """Write the HTML file."""
    write_text(path, text)


def _numbered(sections: Sequence[Section]) -> list[tuple[str, str, Table]]:
    """Name, title and table of everything that has one."""
    blocks = [block for section in sections for block in section.blocks]
    sheets = [(b.name, b.title, b.table) for b in blocks if isinstance(b, Sheet)]
    return sheets + [(b.name, b.title, b.data) for b in blocks if isinstance(b, Chart)]


def tables(folder: Path, sections: Sequence[Section], overwrite: bool = False) -> int:
    """Write every table, also those behind charts, as Markdown and as CSV; returns the number of files."""
    blocks = _numbered(sections)
    with replacing(folder, "tables", overwrite=overwrite) as beside:
        for name, title, table in blocks:
            (beside / f"{name}.md").write_text(f"**{title}**\n\n{shown(table)[0].markdown()}", encoding="utf-8")
            with open(beside / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(plain(table))
    return 2 * len(blocks)


def plain(table: Table) -> list[list[Any]]:
    """Header and rows for a program: full precision, mean, sd and n in columns of their own, "" for not recorded."""
    spreads = [any(isinstance(row[i], Spread) for row in table.rows) for i in range(len(table.headers))]
    header: list[Any] = []
    for name, spread in zip(table.headers, spreads, strict=True):
        header += [f"{name} mean", f"{name} sd", f"{name} n"] if spread else [name]
    rows = [header]
    for row in table.rows:
        line: list[Any] = []
        for value, spread in zip(row, spreads, strict=True):
            if not spread:
                line.append("" if value is None else value)
            elif isinstance(value, Spread):
                line += [value.mean, "" if value.sd is None else value.sd, value.n]
            else:
                line += ["" if value is None else value, "", ""]
        rows.append(line)
    return rows


def figures(folder: Path, sections: Sequence[Section], overwrite: bool = False) -> int:
    """Write every chart as PNG and SVG; returns the number of files."""
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    with replacing(folder, "figures", overwrite=overwrite) as beside:
        for chart in charts:
            drawing.write(chart, beside / f"{chart.name}.png", beside / f"{chart.name}.svg")
    return 2 * len(charts)

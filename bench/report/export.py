"""Files of a report: the page, its tables for papers and slides, its charts; each written beside and then renamed."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import drawing
from bench.report.content import Chart, Section, Sheet
from bench.report.values import Spread
from common.files import replacing_file, write_text
from common.tables import Table


def page(path: Path, text: str) -> None:
    """Write the HTML file."""
    write_text(path, text)


def _numbered(sections: Sequence[Section]) -> list[tuple[str, str, Table]]:
    """Name, title and table of everything that has one."""
    blocks = [block for section in sections for block in section.blocks]
    sheets = [(b.name, b.title, b.table) for b in blocks if isinstance(b, Sheet)]
    return sheets + [(b.name, b.title, b.data) for b in blocks if isinstance(b, Chart)]


def tables(folder: Path, sections: Sequence[Section]) -> list[Path]:
    """Write every table, also those behind charts, as Markdown and as CSV; returns the files."""
    written = []
    for name, title, table in _numbered(sections):
        write_text(folder / f"{name}.md", f"**{title}**\n\n{table.markdown()}")
        with (
            replacing_file(folder / f"{name}.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(plain(table))
        written += [folder / f"{name}.md", folder / f"{name}.csv"]
    return written


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


def figures(folder: Path, sections: Sequence[Section]) -> list[Path]:
    """Write every chart as PNG and SVG; returns the files."""
    written = []
    for chart in (block for section in sections for block in section.blocks if isinstance(block, Chart)):
        png, svg = folder / f"{chart.name}.png", folder / f"{chart.name}.svg"
        with replacing_file(png) as first, replacing_file(svg) as second:
            drawing.write(chart, first, second)
        written += [png, svg]
    return written

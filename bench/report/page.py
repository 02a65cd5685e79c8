"""The report as one HTML file."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from bench.report import drawing, palette
from bench.report.content import Section
from bench.report.values import Spread
from common.tables import NOT_RECORDED, Table, cell

_HERE = Path(__file__).parent


def _cell(value: Any) -> str:
    """A table cell: numbers on one line, what is missing in grey, line breaks kept."""
    if value is None or value == NOT_RECORDED:
        return f'<td class="missing">{NOT_RECORDED}</td>'
    shown = escape(str(value) if isinstance(value, Spread) else cell(value))
    if isinstance(value, int | float | Spread) and not isinstance(value, bool):
        return f'<td class="number">{shown}</td>'
    return f"<td><pre>{shown}</pre></td>" if "\n" in shown else f"<td>{shown}</td>"


def table(shown: Table, caption: str) -> Markup:
    """A <table> with caption; the first column names the row, once for consecutive rows of the same name."""
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in shown.headers)
    body = []
    for name, rows in groupby(shown.rows, key=lambda row: cell(row[0])):
        lines = ["".join(map(_cell, rest)) for _, *rest in rows]
        scope = f'"rowgroup" rowspan="{len(lines)}"' if len(lines) > 1 else '"row"'
        body.append(f"<tbody><tr><th scope={scope}>{escape(name)}</th>" + "</tr>\n<tr>".join(lines) + "</tr></tbody>\n")
    caption = escape(caption)
    return Markup(f"<table><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n{''.join(body)}</table>")


def _colours(dark: bool) -> str:
    """CSS variables that the charts' colours are named by."""
    pairs = ((light, light) for light in palette.DARK) if not dark else palette.DARK.items()
    return " ".join(f"--{light[1:]}: {colour};" for light, colour in pairs)


def render(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        title: Heading and window title.
        sections: What to show.
        facts: What was read, where and when, for the head of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        facts=facts,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        light=Markup(_colours(dark=False)),
        dark=Markup(_colours(dark=True)),
        svg=lambda chart: Markup(drawing.svg(chart)),
        table=table,
    )

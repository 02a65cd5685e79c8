"""The report as one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.report import drawing, palette
from bench.report.content import Section
from bench.report.values import Spread
from bench.tables import NOT_RECORDED, Table, cell

_HERE = Path(__file__).parent


def _cell(value: Any) -> Markup:
    """A table cell: numbers to the right, what is missing in grey, line breaks kept."""
    if value is None or value == NOT_RECORDED:
        return Markup('<td class="missing">{}</td>').format(NOT_RECORDED)
    if isinstance(value, Spread):
        return Markup('<td class="number">{}</td>').format(str(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Markup('<td class="number">{}</td>').format(cell(value))
    shown = cell(value)
    if "\n" in shown:
        return Markup("<td><pre>{}</pre></td>").format(shown)
    return Markup("<td>{}</td>").format(shown)


def table(shown: Table, caption: str) -> Markup:
    """A <table> with caption; the first column names the row."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(header) for header in shown.headers)
    template = Markup('<tr><th scope="row">{}</th>{}</tr>\n')
    rows = (template.format(cell(first), Markup("").join(map(_cell, rest))) for first, *rest in shown.rows)
    made = Markup("<table><caption>{}</caption>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody></table>")
    return made.format(caption, head, Markup("").join(rows))


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

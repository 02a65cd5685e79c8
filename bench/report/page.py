"""The report as one HTML file."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from bench.report import columns, drawing, palette
from bench.report.columns import Column, Written
from bench.report.content import FOLDED, Section, Sheet
from bench.report.provenance import link
from common.tables import NOT_RECORDED, Table

_HERE = Path(__file__).parent
_WIDEST = 30  # characters of a cell that stand on one line
_WIDTHS = (20, 28, 36, 44, 52, 60, 72, 84)  # rem; a table that needs more than its place says that it can be scrolled


def _cell(column: Column, row: int) -> str:
    """A table cell: numbers on one line and to the right, what is missing in grey, line breaks kept."""
    found = column.cells[row]
    if found.text == NOT_RECORDED:
        return f'<td class="missing{" n" if column.numeric else ""}">{NOT_RECORDED}</td>'
    if column.header == "origin" and found.text.isdigit():
        return f'<td class="n">{link(int(found.text))}</td>'
    shown = escape(found.text)
    if column.numeric:
        return f'<td class="n">{shown}{_deviation(found, column.sd_width)}</td>'
    return f"<td><pre>{shown}</pre></td>" if "\n" in shown else f"<td>{shown}</td>"


def _deviation(found: Written, width: int) -> str:
    """The standard deviation in a place of its own, so that the means stand below each other."""
    return f'<span class="sd" style="width:{width}ch">{escape(found.sd)}</span>' if width else ""


def table(shown: Table, caption: str, units: str | None = None, anchors: str = "") -> Markup:
    """A <table> with caption; rows that share their first column stand below a row with what they share."""
    whole = columns.written(shown, units)
    names = [cell.text for cell in whole[0].cells]
    grouped = any(above == below for above, below in pairwise(names))
    first, *rest = whole[1:] if grouped else whole
    heads = [first, *rest]
    head = "".join(
        f'<th scope="col"{" class=n" if column.numeric else ""}>{escape(column.header)}</th>' for column in heads
    )
    body = []
    for name, rows in groupby(range(len(names)), key=names.__getitem__):
        lines = [_row(first, rest, row, anchors) for row in rows]
        band = f'<tr><th class="band" scope="rowgroup" colspan="{len(heads)}"><span>{escape(name)}</span></th></tr>\n'
        body.append(f"<tbody>{band if grouped else ''}{''.join(lines)}</tbody>\n" if grouped else "".join(lines))
    inside = "".join(body) if grouped else f"<tbody>{''.join(body)}</tbody>"
    caption = escape(caption)
    return Markup(
        f'<table><caption class="unseen">{caption}</caption>\n<thead><tr>{head}</tr></thead>\n{inside}</table>'
    )


def _row(first: Column, rest: Sequence[Column], row: int, anchors: str) -> str:
    name = first.cells[row].text
    place = f' id="{escape(anchors)}-{escape(name)}"' if anchors else ""
    return f'<tr{place}><th scope="row">{escape(name)}</th>{"".join(_cell(column, row) for column in rest)}</tr>\n'


def _width(shown: Table) -> int:
    """Class of width: about how many rem the table takes."""
    wide = 0.0
    for i, header in enumerate(shown.headers):
        longest = max([len(header) / 2, *(len(str(columns.shorten(row[i]))) for row in shown.rows[:200])])
        wide += 0.52 * min(longest, _WIDEST) + 1.2
    return next((width for width in _WIDTHS if wide <= width), _WIDTHS[-1])


def scrolled(shown: Table, caption: str, units: str | None = None, anchors: str = "") -> Markup:
    """A table without empty columns, in a region that scrolls and says so where it is narrower than the table."""
    kept, missing = columns.shown(shown)
    hint = f"{len(kept.headers)} columns: scroll sideways to see all"
    note = f"Not recorded in any row: {', '.join(missing)}." if missing else ""
    return Markup(
        '<div class="wide w{}"><p class="hint" aria-hidden="true">{}</p>'
        '<div class="scroll" role="region" aria-label="Table: {}" tabindex="0">\n{}\n</div></div>{}'
    ).format(
        _width(kept), hint, caption, table(kept, caption, units, anchors),
        Markup('<p class="note">{}</p>').format(note) if note else "",
    )  # fmt: skip


def sheet(block: Sheet) -> Markup:
    """A table for reading; a long one is folded, since its verdict stands above it."""
    shown = scrolled(block.table, block.title, block.units, block.anchors)
    rows = len(block.table.rows)
    if rows <= FOLDED or block.anchors:
        return shown
    return Markup("<details><summary>All {} rows of “{}”</summary>\n{}</details>").format(
        f"{rows:,}", block.title, shown
    )


def _colours(dark: bool) -> str:
    """CSS variables that the charts' colours are named by."""
    pairs = ((light, light) for light in palette.DARK) if not dark else palette.DARK.items()
    return " ".join(f"--{light[1:]}: {colour};" for light, colour in pairs)


def render(
    title: str, sections: Sequence[Section], facts: Mapping[str, str], origins: Callable[[Sequence[Any]], Markup]
) -> str:
    """The whole page.

    Args:
        title: Heading and window title.
        sections: What to show.
        facts: What was read, where and when, for the head of the page.
        origins: Links to where records come from.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    return environment.get_template("page.html").render(
        title=title,
        parts=[(part, list(some)) for part, some in groupby(sections, key=lambda section: section.part)],
        facts=facts,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        widths=_WIDTHS,
        light=Markup(_colours(dark=False)),
        dark=Markup(_colours(dark=True)),
        svg=lambda chart: Markup(drawing.svg(chart)),
        scrolled=scrolled,
        sheet=sheet,
        origins=origins,
    )

"""Figures: one measured number each, against its target, by the experiment that measured them."""

from collections.abc import Sequence

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence
from bench.report.provenance import Provenance
from bench.report.values import Record, Spread, count
from common.tables import Table

_LEAD = "The newest measurement of each figure and the target it was held against; its origin has the command."
_HEADERS = ("figure", "measured", "unit", "target", "reached", "origin")
_NAMED = 3  # missed targets that a verdict names


def section(evidence: Evidence) -> Section | None:
    """A table for each experiment, those that missed targets first; None without figures."""
    if not evidence.figures:
        return None
    places = evidence.provenance
    found = sorted(evidence.experiments.items(), key=lambda pair: -len(missed(pair[1])))
    sheets = [_sheet(name, figures, places) for name, figures in found]
    return Section("figures", "Figures against targets", f"{_LEAD} {summary(evidence.figures)}", sheets)


def summary(figures: Sequence[Record]) -> str:
    """How many targets there are, and how many were reached."""
    judged = [one for one in figures if one["reached"] is not None]
    if not judged:
        return f"None of {count(len(figures), 'figure')} has a target."
    late = len(missed(figures))
    rest = f"; {count(len(figures) - len(judged), 'figure')} without one" if len(figures) > len(judged) else ""
    return f"{len(judged) - late} of {count(len(judged), 'target')} reached, {late} missed{rest}."


def missed(figures: Sequence[Record]) -> list[Record]:
    """Figures that were measured and did not reach their target."""
    return [one for one in figures if one["reached"] is False]


def _sheet(name: str, figures: Sequence[Record], places: Provenance) -> Sheet:
    rows = [
        [one["what"], _value(one), one["unit"], one["target"], _reached(one), *places.numbers([one])]
        for one in sorted(figures, key=lambda one: one["reached"] is not False)
    ]
    late = [one["what"] for one in missed(figures)]
    more = f"; and {len(late) - _NAMED} more" if len(late) > _NAMED else ""
    said = summary(figures) + (f" Missed: {'; '.join(late[:_NAMED])}{more}." if late else "")
    title = name.replace("_", " ").capitalize() if name else "Other figures"
    table = Table(_HEADERS, rows)
    return Sheet(f"figures-{name or 'other'}", title, table, verdict=said, units="unit", records=figures)


def _value(one: Record) -> Spread | None:
    return None if one["value"] is None else Spread(float(one["value"]), one["spread"], 1)


def _reached(one: Record) -> str:
    return "not measured" if one["value"] is None else {True: "yes", False: "no", None: ""}[one["reached"]]

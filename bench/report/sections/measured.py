"""Figures: one measured number each, against its target."""

from bench.report.content import Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import Record
from bench.tables import figures
from common.tables import Table

_LEAD = "The newest measurement of each figure, the target it was held against, and the command that measures it again."


def section(evidence: Evidence) -> Section | None:
    """Table of measured against target; None without figures."""
    if not evidence.figures:
        return None
    rows = [
        [e["what"], figures.measured(e), e["target"], _verdict(e), e["command"], _origin(e)] for e in evidence.figures
    ]
    headers = ["figure", "measured", "target", "reached", "command", "measured on"]
    return Section(
        "figures", "Figures against targets", _LEAD, [Sheet("figures", "Measured and target", Table(headers, rows))]
    )


def _verdict(entry: Record) -> str | None:
    return None if entry["value"] is None else {True: "yes", False: "no", None: "no target"}[entry["reached"]]


def _origin(entry: Record) -> str | None:
    """Machine and versions; None where the record has no complete stamp."""
    try:
        return figures.origin(entry)
    except (KeyError, TypeError, AttributeError):
        return None

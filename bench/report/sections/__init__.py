"""The sections of the report, in reading order; one file each, with a function that makes it from the evidence.

A section whose records are missing is None and leaves no trace in the report.
"""

from collections.abc import Callable

from bench.report.content import Section
from bench.report.evidence import Evidence
from bench.report.sections import (
    breakdown,
    calibration,
    collectives,
    curves,
    frontier,
    headline,
    measured,
    prefill,
    quality,
    rates,
    roles,
    runs,
    scaling,
    structure,
    survival,
    tiers,
    trouble,
)

SECTIONS: tuple[Callable[[Evidence], Section | None], ...] = (
    headline.section,
    quality.section,
    breakdown.section,
    roles.section,
    rates.section,
    scaling.section,
    curves.section,
    collectives.section,
    prefill.section,
    frontier.section,
    calibration.section,
    survival.section,
    structure.section,
    tiers.section,
    measured.section,
    trouble.section,
    runs.section,
)

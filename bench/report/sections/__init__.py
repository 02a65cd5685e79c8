"""The sections of the report, in reading order; one file each, with a function that makes it from the evidence.

A section whose records are missing is None and leaves no trace in the report.
"""

from collections.abc import Callable
from dataclasses import replace

from bench.report import features
from bench.report.content import Section
from bench.report.evidence import Evidence
from bench.report.features import blocks, gradients, tokens
from bench.report.sections import (
    breakdown,
    calibration,
    collectives,
    comparison,
    curves,
    frontier,
    headline,
    measured,
    origins,
    overview,
    prefill,
    quality,
    rates,
    roles,
    runs,
    scaling,
    structure,
    survival,
    tiers,
    together,
    tradeoff,
    trouble,
)

SECTIONS: dict[str, tuple[Callable[[Evidence], Section | None], ...]] = {
    "": (overview.section, comparison.section),
    "Gradient compression": (
        tradeoff.of(gradients.FEATURE),
        headline.section,
        quality.section,
        breakdown.section,
        roles.section,
        rates.section,
        scaling.section,
        curves.section,
        collectives.section,
    ),
    "Token pruning": (
        tradeoff.of(tokens.FEATURE),
        prefill.section,
        frontier.section,
        calibration.section,
        survival.section,
    ),
    "Structured pruning": (tradeoff.of(features.structure.FEATURE), structure.section),
    "Block sparsity": (tradeoff.of(blocks.FEATURE), tiers.section),
    "All together": (together.section,),
    "Evidence": (measured.section, trouble.section, runs.section, origins.section),
}


def make(evidence: Evidence) -> list[Section]:
    """The sections that the evidence has something for, each in its part of the report."""
    return [
        replace(section, part=part)
        for part, makers in SECTIONS.items()
        for maker in makers
        if (section := maker(evidence))
    ]

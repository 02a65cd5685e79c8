"""What a feature saves against what it costs: the first thing that is shown of each."""

from collections.abc import Callable

from bench.report import pareto
from bench.report.content import Section
from bench.report.evidence import Evidence
from bench.report.features import Feature

_LEAD = (
    "A point is one way of making the model cheaper. The line joins those that no other way beats in both quantities; "
    "controls, which cost nothing to find, never stand on it. Panels are not to be compared with each other."
)


def of(feature: Feature) -> Callable[[Evidence], Section | None]:
    """The section of a feature; it is None without points."""

    def section(evidence: Evidence) -> Section | None:
        cases = feature.cases(evidence)
        if not cases:
            return None
        return Section(f"tradeoff-{feature.name}", "Saved against lost", _LEAD, [pareto.chart(feature, cases)])

    return section

"""The first screen: each feature in a verdict that is made from the records, and its picture."""

from markupsafe import Markup

from bench.report.content import Markings, Section
from bench.report.evidence import Evidence
from bench.report.features import FEATURES, Feature
from bench.report.features.base import Verdict, verdict
from bench.report.provenance import Provenance, links
from bench.report.sections import measured

_LEAD = (
    "What each feature saves and what that costs, as far as these records tell. A verdict names the largest saving "
    "that keeps the quality; where none does, the best quality that there is. Speed is measured."
)
_CARD = Markup(
    '<div class="card" id="verdict-{name}"><h3><a href="#tradeoff-{name}-section">{title}</a></h3>\n'
    '<p class="quiet">{idea}</p>\n<p><strong>{claim}</strong> {detail}</p>\n<p>{speed}</p>{origins}</div>\n'
)


def section(evidence: Evidence) -> Section | None:
    """A card and a picture for every feature with points or speeds; None without any."""
    cards = Markup("")
    for feature in FEATURES:
        cases, speeds = feature.cases(evidence), feature.speeds(evidence)
        if cases or speeds:
            cards += _card(feature, verdict(feature, cases, speeds), evidence.provenance)
    if not cards:
        return None
    targets = Markup("")
    if any(one["reached"] is not None for one in evidence.figures):
        targets = Markup('<p><a href="#figures-section">Targets</a>: {}</p>').format(measured.summary(evidence.figures))
    shown = Markings(Markup('<div class="cards">{}</div>\n{}').format(cards, targets))
    return Section("overview", "Overview", _LEAD, [shown])


def _card(feature: Feature, said: Verdict, places: Provenance) -> Markup:
    origins = links(places.numbers(said.records))
    words = {"claim": said.claim, "detail": said.detail, "speed": said.speed}
    return _CARD.format(name=feature.name, title=feature.title, idea=feature.idea, origins=origins, **words)

"""What a feature saves against what it costs, and the verdict in words that follows from the records."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from bench.report.evidence import Evidence
from bench.report.values import Record, count, number
from bench.tables.figures import experiment

_NOISE = 1.1


@dataclass(frozen=True)
class Point:
    """One way of making something cheaper, as measured.

    Attributes:
        name: Of the method.
        saving: What it saves, in the unit of the feature's axis; higher is better.
        quality: What is left of the quality, in the unit of the other axis.
        error: How far quality may be off, downwards and upwards: a standard deviation, or to the ends of an interval.
        control: Whether it is chance, or another free way that any method must beat.
        records: What it was read from.
        arithmetic: Whether the saving is what arithmetic allows, not a time that was measured.
    """

    name: str
    saving: float
    quality: float
    error: tuple[float, float] = (0.0, 0.0)
    control: bool = False
    records: tuple[Record, ...] = ()
    arithmetic: bool = False


def of_figure(name: str, saving: float, over_dense: float | None, figure: Record, control: str) -> list[Point]:
    """The point of a figure that is a perplexity over the dense model's; none without that.

    Args:
        name: Of the method.
        saving: See ``Point``.
        over_dense: How many times the dense model's.
        figure: Its spread counts where it is of the same unit.
        control: What the names of controls have in them.
    """
    if over_dense is None:
        return []
    spread = (number(figure, "spread") or 0.0) if figure["unit"] == "×" else 0.0
    return [Point(name, saving, over_dense, (spread, spread), control in name.lower(), (figure,))]


def setting(figure: Record) -> str:
    """What measured a figure, and on how many tokens: points of two settings do not compare."""
    tokens = number(figure, "details.evaluated_tokens")
    return experiment(figure) + (f", {tokens:,.0f} tokens" if tokens is not None else "")


@dataclass(frozen=True)
class Case:
    """Points that may be compared: one model, one text, one way of training."""

    title: str
    points: list[Point]


@dataclass(frozen=True)
class Speed:
    """A speed-up, measured unless it says otherwise.

    Attributes:
        what: What was faster, and with which method.
        key: The method or model alone: the best and the worst that are told are of one.
        value: Times as fast as without.
        bound: What the arithmetic or the bytes left out would allow; None where not recorded.
        records: What it was read from.
        modelled: Whether it was computed for a link that was not there, not measured.
    """

    what: str
    key: str
    value: float
    bound: float | None = None
    records: tuple[Record, ...] = ()
    modelled: bool = False

    @property
    def doubtful(self) -> bool:
        """Whether it beats its bound by more than noise."""
        return self.bound is not None and self.value > _NOISE * self.bound


@dataclass(frozen=True)
class Axis:
    """One of the two quantities of a feature.

    Attributes:
        label: With the unit, for the drawing.
        header: The same, short, for tables.
        plain: Where the model that nothing was done to stands.
        better: 1 where higher is better, -1 where lower is.
    """

    label: str
    header: str
    plain: float
    better: int = 1


OVER_DENSE = (
    Axis("perplexity, times the dense model's", "perplexity (× dense)", 1.0, -1),
    1.1,
    "perplexity within 1.1 × the dense model's",
)
"""Quality as perplexity over the dense model's: ``Feature.quality``, ``tolerable`` and ``rule``."""


@dataclass(frozen=True)
class Feature:
    """One of the four.

    Attributes:
        name: Anchor; also the name of its folder or its command.
        title: Heading.
        idea: What it pares, in a sentence.
        saving: The quantity across.
        quality: The quantity up.
        tolerable: The worst quality that still counts as kept.
        rule: The same in words: what a good point keeps.
        cases: Reads the points, the strongest evidence first.
        speeds: Reads the measured speed-ups, the most telling first.
        said: A point in words, as the beginning of a sentence.
    """

    name: str
    title: str
    idea: str
    saving: Axis
    quality: Axis
    tolerable: float
    rule: str
    cases: Callable[[Evidence], list[Case]]
    speeds: Callable[[Evidence], list[Speed]]
    said: Callable[[Point], str]

    def good(self, point: Point) -> bool:
        """Whether a point keeps the quality."""
        return self.quality.better * (point.quality - self.tolerable) >= 0

    def front(self, points: Iterable[Point]) -> list[Point]:
        """The points that no other one equals or beats in both quantities, by rising saving; controls left out."""
        sign = self.quality.better
        found: list[Point] = []
        for point in sorted(_methods(points), key=lambda p: (p.saving, sign * p.quality), reverse=True):
            if not found or sign * point.quality > sign * found[-1].quality:
                found.append(point)
        return found[::-1]

    def chosen(self, case: Case) -> Point | None:
        """The point that the verdict is about: the largest saving that keeps the quality, else the best quality."""
        methods = _methods(case.points)
        kept = [point for point in methods if self.good(point)]
        if kept:
            return max(kept, key=lambda p: (p.saving, self.quality.better * p.quality))
        return max(methods, key=lambda p: (self.quality.better * p.quality, p.saving), default=None)


@dataclass(frozen=True)
class Verdict:
    """A feature in a few sentences, and the records that they are made from.

    Attributes:
        claim: What is kept at which saving.
        detail: Of which method, model and text, and what controls do; "" without a point.
        speed: What was measured to be faster.
        records: What all of it was read from.
    """

    claim: str
    detail: str
    speed: str
    records: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        """All of it."""
        return " ".join(filter(None, (self.claim, self.detail, self.speed)))


def verdict(feature: Feature, cases: Sequence[Case], speeds: Sequence[Speed]) -> Verdict:
    """What the records say of a feature; what they do not say is said to be missing."""
    speed, records = _fastest(speeds)
    point = feature.chosen(cases[0]) if cases else None
    if point is None:
        return Verdict("No record compares its quality with that of the model left alone.", "", speed, records)
    control, again = _control(feature, cases[0], point), _elsewhere(cases, point)
    told = [f"{point.name}: {cases[0].title}", *(f"on {text}: {_short(feature, other)}" for text, other in again)]
    told += [f"beside it, {control.name}: {_short(feature, control)}"] if control else []
    claim, sources = feature.said(point), [point, *(other for _, other in again), *([control] if control else [])]
    if not feature.good(point):
        claim = f"On {cases[0].title}, no measured way keeps {feature.rule}: {_within(claim)}"
        for title, kept in _kept_best(feature, cases[1:]):
            claim, sources = f"{claim}; on {title}: {_within(feature.said(kept))}", [*sources, kept]
    records = [*(one for source in sources for one in source.records), *records]
    return Verdict(f"{claim}.", f"({'; '.join(told)})", speed, records)


def _within(said: str) -> str:
    """A sentence within another."""
    return f"{said[:1].lower()}{said[1:]}"


def _kept_best(feature: Feature, cases: Sequence[Case]) -> list[tuple[str, Point]]:
    """The title and the point of the largest saving that keeps the quality; nothing where no point does."""
    chosen = [(case.title, point) for case in cases if (point := feature.chosen(case)) and feature.good(point)]
    return sorted(chosen, key=lambda one: one[1].saving)[-1:]


def _fastest(speeds: Sequence[Speed]) -> tuple[str, list[Record]]:
    """The best speed-up and the least of the same method in words, and their records; modelled if none is measured."""
    found = [one for one in speeds if not one.doubtful]
    out = len(speeds) - len(found)
    found = [one for one in found if not one.modelled] or found
    found = list({one.what: one for one in sorted(found, key=_day)}.values())  # of one measurement the newest
    left = f" {count(out, 'measurement')} above the bound left out." if out else ""
    if not found:
        return f"No record has its speed.{left}", []
    best = max(found, key=lambda one: min(one.value, one.bound or one.value))  # what is above its bound is noise
    least = min((one for one in found if one.key == best.key), key=lambda one: one.value)
    said = f"{'Modelled' if best.modelled else 'Measured'}: {_speed(best)}"
    if least is not best:
        said += f"; {'at least' if least.value > 1.05 else 'but'} {_speed(least)}"
    return f"{said}.{left}", [*best.records, *least.records]


def _day(speed: Speed) -> str:
    return max((str(one.get("date", "")) for one in speed.records), default="")


def _elsewhere(cases: Sequence[Case], point: Point) -> list[tuple[str, Point]]:
    """The same way of pruning the same model, measured on another text: the text, and the point."""
    model, _, rest = cases[0].title.partition(", ")
    found = []
    for case in cases[1:]:
        other, _, text = case.title.partition(", ")
        same = [p for p in case.points if p.name == point.name and abs(p.saving - point.saving) <= 0.02 * point.saving]
        if other == model and same and text.partition(", ")[2] == rest.partition(", ")[2]:
            found.append((text.partition(", ")[0], same[0]))
    return found


def _control(feature: Feature, case: Case, point: Point) -> Point | None:
    """The best control that saves about as much."""
    near = [p for p in case.points if p.control and abs(p.saving - point.saving) <= 0.1 * abs(point.saving)]
    return max(near, key=lambda p: feature.quality.better * p.quality, default=None)


def _short(feature: Feature, point: Point) -> str:
    unit = feature.quality.header.rpartition("(")[2].rstrip(")")
    return f"{point.quality:.3g} {unit}".replace("× dense", "×")


def _speed(speed: Speed) -> str:
    bound = f" (bound {speed.bound:.2f} ×)" if speed.bound is not None else ""
    return f"{speed.value:.2f} × as fast{bound} for {speed.what}"


def _methods(points: Iterable[Point]) -> list[Point]:
    return [p for p in points if not p.control and math.isfinite(p.saving) and math.isfinite(p.quality)]

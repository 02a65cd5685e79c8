"""Gradient compression: bytes saved against perplexity, and what a training step gains on which link."""

import re

from bench.report.evidence import Evidence
from bench.report.features.base import Axis, Case, Feature, Point, Speed
from bench.report.groups import Group, Panel, panels
from bench.report.link import link_rate, modelled
from bench.report.values import Spread, number, quantity, ratio, text

_BITS = 32  # of a gradient's element that nothing is done to
_STEP = re.compile(r"(?: \(were nothing sent: ([\d.]+)\))?: (.*)")  # the bound of a step, and whose it is


def _cases(evidence: Evidence) -> list[Case]:
    return [*_method_quality(evidence), *_runs(evidence)]


def _method_quality(evidence: Evidence) -> list[Case]:
    """Figures of the experiment that trains with every method on the same tokens."""
    points = []
    for one in evidence.figures_of("method_quality"):
        bits, change = number(one, "details.bits_per_element"), number(one, "value")
        if bits and change is not None and one["figure"] != "quality-none":
            spread = number(one, "spread") or 0.0
            name = one["figure"].removeprefix("quality-")
            points.append(Point(name, _BITS / bits, change, (spread, spread), records=(one,)))
    return [Case("small GPT-2, same tokens for all, gradients alone", points)] if points else []


def _runs(evidence: Evidence) -> list[Case]:
    """Runs that trained to a perplexity: all bytes that they sent, against an uncompressed run of the same setting."""
    cases = []
    for panel in panels(evidence.groups, ("link",)):
        plain = panel.baseline_of(lambda one: one.ppl and one.bytes_per_step)
        points = [point for one in panel.groups if plain and one is not plain and (point := _point(plain, one))]
        if points:
            cases.append(Case(f"{panel.title or 'these runs'}, gradients and parameters", points))
    return cases


def _point(plain: Group, one: Group) -> Point | None:
    saved, change = ratio(plain.bytes_per_step, one.bytes_per_step), ratio(one.ppl, plain.ppl)
    if saved is None or change is None:
        return None
    error = 100 * change.error
    return Point(
        one.method, saved.mean, 100 * (change.mean - 1), (error, error), records=(*plain.records, *one.records)
    )


def _speeds(evidence: Evidence) -> list[Speed]:
    found = []
    for one in evidence.figures_of("slow_links"):
        network, value = one["details"].get("network"), number(one, "value")
        if one["figure"].startswith("speedup-none-") or network is None or value is None:
            continue
        method = text(one["details"].get("method")).strip("`")
        found.append(Speed(f"a training step at {_rate(network)} with {method}", method, value, records=(one,)))
    for one in evidence.figures_of("local_steps"):
        if one["figure"].startswith("gain-") and (value := number(one, "value")) is not None:
            what = f"training to a perplexity at {_rate(one['details'].get('network'))} with local steps"
            found.append(Speed(what, "local steps", value, records=(one,)))
    for one in evidence.figures_of("two_levels"):
        said = _STEP.search(one["what"])
        if one["figure"].startswith("step-") and said and (value := number(one, "value")) is not None:
            free, what = said.groups()
            bound = float(free) if free else None
            found.append(Speed(f"a training step, {what}", "two levels", value, bound, (one,)))
    return found or [speed for panel in panels(evidence.groups) for speed in _of(panel)]


def _rate(network: object) -> str:
    rate = link_rate({"link_rate": network})
    return quantity(rate, "bit/s") if rate else text(network)


def _of(panel: Panel) -> list[Speed]:
    pairs: list[tuple[Group, Spread | None]] = [(g, panel.speedup(g)) for g in panel.groups if not g.uncompressed]
    return [
        Speed(
            f"a training step with {one.method}" + (f" ({panel.title})" if panel.title else ""),
            one.method,
            speedup.mean,
            _bound(panel, one),
            (*one.records, *(panel.baseline.records if panel.baseline else ())),
            modelled(one.records[0]),
        )
        for one, speedup in pairs
        if speedup
    ]


def _bound(panel: Panel, one: Group) -> float | None:
    """The uncompressed step over the ideal step of the method."""
    ideal = ratio(panel.baseline.step_ms, one.spread("bound_step_time_ms")) if panel.baseline else None
    return ideal.mean if ideal else None


def _said(point: Point) -> str:
    return f"{point.saving:.1f} × fewer bytes change perplexity by {point.quality:+.2f} %"


FEATURE = Feature(
    "gradient_compression",
    "Gradient compression",
    "Fewer bytes between the ranks of a training run.",
    Axis("bytes sent, times fewer", "fewer bytes (×)", 1.0),
    Axis("perplexity, change (%)", "perplexity change (%)", 0.0, -1),
    1.0,
    "perplexity within 1 %",
    _cases,
    _speeds,
    _said,
)

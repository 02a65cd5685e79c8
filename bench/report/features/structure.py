"""Structured pruning: share of the decoder removed against perplexity, and the speed of the smaller model."""

import re
from collections import defaultdict
from collections.abc import Mapping

from bench.report.evidence import Evidence, run_name
from bench.report.features.base import OVER_DENSE, Axis, Case, Feature, Point, Speed, of_figure, setting
from bench.report.values import Record, number, text

_SHARE = re.compile(r"(\d+)\s*% of the decoder")
_CONTROL = "random"


def _cases(evidence: Evidence) -> list[Case]:
    found: dict[str, list[Point]] = defaultdict(list)
    for one in evidence.figures_of("structured_peers"):
        details, removed = one["details"], number(one, "details.removed")
        if removed is not None:
            title = f"{text(details.get('model'))}, {text(details.get('text'))}, {_trained(details)} ({setting(one)})"
            found[title] += of_figure(text(details.get("arm")), 100 * removed, number(one, "value"), one, _CONTROL)
    for one in evidence.figures_of("real_model"):
        if one["details"].get("arm") == "structured-25":
            title = f"{text(one['details'].get('model'))}, {text(one['details'].get('text'))}"
            title += f", nothing trained ({setting(one)})"
            found[title] += of_figure("default", 25.0, number(one, "value"), one, _CONTROL)
    for one in evidence.figures_of("structured_recovery"):
        share, when = _SHARE.search(one["what"]), one["figure"].split("-")[1]
        if share and when in ("before", "after"):
            title = "Llama of 8 M parameters, " + ("nothing trained" if when == "before" else "recovered")
            found[title] += of_figure("default", float(share[1]), number(one, "value"), one, _CONTROL)
    for one in evidence.figures_of("structured_ablation"):
        details, ppl, dense = one["details"], number(one, "value"), number(one, "details.dense_ppl")
        if dense and ppl is not None and "importance" in details:
            name = f"{text(details['importance'])} {text(details.get('allocation'))}".replace("`", "")
            budget = float(text(details.get("budget")).rstrip("%"))
            title = "Llama of 8 M parameters, every importance, " + (
                "nothing trained" if details.get("when") == "before" else "a short recovery"
            )
            found[title] += of_figure(name, budget, ppl / dense, one, _CONTROL)
    for run in evidence.runs:
        for title, point in _run(run):
            found[title].append(point)
    return [Case(title, points) for title, points in found.items()]


def _trained(details: Record) -> str:
    """What followed pruning, told so that only what was recovered alike stands together."""
    if details.get("when") != "after":
        return "nothing trained"
    recovery = details.get("recovery")
    if not isinstance(recovery, Mapping):
        return "recovered (how is not recorded)"
    return "recovered alike: " + " and ".join(f"{name} {text(value)}" for name, value in sorted(recovery.items()))


def _run(run: Record) -> list[tuple[str, Point]]:
    """Perplexity around pruning (`structure`) and around recovery (`recovery`), of one run."""
    found = []
    after, before = number(run, "structure.ppl_after"), number(run, "structure.ppl_before")
    for kind in ("decoder_parameters", "parameters"):
        whole, left = (number(run, f"structure.{kind}_{when}") for when in ("before", "after"))
        if whole and left is not None and after is not None and before:
            point = Point(run_name(run), 100 * (1 - left / whole), after / before, records=(run,))
            found.append((f"{text(run.get('model'))}, these runs", point))
            break
    return found


def _speeds(evidence: Evidence) -> list[Speed]:
    found = []
    for one in evidence.figures_of("structured_speed"):
        share = _SHARE.search(one["what"])
        what = f"{share[1]} % of the decoder removed, " if share else ""
        found += _speed(one["details"], what, one)
    for run in evidence.runs:
        block = run.get("inference")
        rows = block.get("rows") if isinstance(block, dict) else None
        for row in rows or []:
            found += _speed(row, f"{run_name(run)}, ", run) if isinstance(row, dict) else []
    return found


def _speed(row: Record, what: str, source: Record) -> list[Speed]:
    value, phase = number(row, "speedup"), row.get("phase")
    if value is None or phase is None:
        return []
    bounds = [bound for name in ("flop_bound", "byte_bound") if (bound := number(row, name)) is not None]
    name = f"{what}{phase} at batch {text(row.get('batch'))}"
    return [Speed(name, what, value, max(bounds, default=None), (source,))]


def _said(point: Point) -> str:
    return f"With {point.saving:.0f} % of the decoder removed perplexity is {point.quality:.2f} × the dense model's"


FEATURE = Feature(
    "structured_pruning",
    "Structured pruning",
    "Whole attention heads, channels and layers go; what is left is a smaller model.",
    Axis("decoder parameters removed (%)", "removed (%)", 0.0),
    *OVER_DENSE,
    _cases,
    _speeds,
    _said,
)

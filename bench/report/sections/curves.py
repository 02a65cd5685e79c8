"""Validation perplexity as training goes on, by step and by time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from bench.report import drawing
from bench.report.content import Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.groups import Group, Panel, panels, representatives
from bench.report.link import modelled
from bench.report.values import Record, Spread, number, spread
from common.tables import Table

_LEAD = (
    "Validations made during training, mean over seeds with a band of one standard deviation. Time is training time; "
    "validation is not counted."
)


@dataclass(frozen=True)
class Point:
    """Validation after `step` steps, over the runs of a group."""

    step: float
    seconds: Spread
    ppl: Spread


def curve(runs: Sequence[Record]) -> list[Point]:
    """Points that every run of the group has, by rising step; empty when the runs validated at different steps."""
    found: list[dict[float, tuple[float, float]]] = []
    for run in runs:
        points = run.get("val_curve")
        entries = [p for p in points if isinstance(p, dict)] if isinstance(points, list) else []
        read = [[number(p, name) for name in ("step", "train_s", "val_ppl")] for p in entries]
        found.append({p[0]: (p[1], p[2]) for p in read if p[0] is not None and p[1] is not None and p[2] is not None})
    found = [points for points in found if points]
    steps = sorted(set.intersection(*(set(points) for points in found))) if found else []
    made = []
    for step in steps:
        seconds, ppl = spread(points[step][0] for points in found), spread(points[step][1] for points in found)
        if seconds and ppl and math.isfinite(ppl.mean):
            made.append(Point(step, seconds, ppl))
    return made


def section(evidence: Evidence) -> Section | None:
    """PPL by step and by time, and time to the target; None when no run validated twice."""
    blocks: list[Chart | Sheet] = []
    if by_step := _lines(panels(evidence.groups, across=("link",))):
        blocks.append(_chart(evidence, by_step, "ppl-by-step", "optimizer step", lambda p: p.step))
    timed = [one for one in evidence.groups if not modelled(one.records[0])]  # else time is that without the link
    if by_time := _lines(panels(timed)):
        blocks.append(_chart(evidence, by_time, "ppl-by-time", "training time (s)", lambda p: p.seconds.mean))
    targets = _targets(timed)
    return Section("curves", "Training curves", _LEAD, [*blocks, *targets]) if blocks or targets else None


def _lines(found: Sequence[Panel]) -> list[tuple[str, list[tuple[Group, list[Point]]]]]:
    """Title and curves of each panel that has any."""
    made = []
    for panel in found:
        lines = [(group, points) for group in representatives(panel) if len(points := curve(group.records)) > 1]
        made += [(panel.title, lines)] if lines else []
    return made


def _targets(groups: Sequence[Group]) -> list[Sheet]:
    rows, runs = [], []
    for panel in panels(groups):
        for group in panel.groups:
            targets = {t for run in group.records if (t := number(run, "target_ppl")) is not None}
            fixed = {t for run in group.records if (t := number(run, "fixed_time_s")) is not None}
            if targets or fixed:
                runs += group.records
                reached = group.spread("time_to_target_ppl_s")
                share = f"{reached.n if reached else 0} of {len(group.records)}"
                rows.append([panel.title or "all", group.method, sorted(targets) or None, share, reached,
                             sorted(fixed) or None, group.spread("ppl_at_fixed_time")])  # fmt: skip
    headers = [
        "setting",
        "method",
        "target PPL",
        "runs that reached it",
        "time to it (s)",
        "fixed time (s)",
        "PPL then",
    ]
    title = "Time to a perplexity, and perplexity at a time"
    note = "Times are means over the runs that reached the target; read them with the column that counts those."
    timed = [row for row in rows if row[4] is not None]
    said = "No run reached its target."
    if timed:
        first = min(timed, key=lambda row: row[4].mean)
        said = f"First at its target: {first[1]} ({first[0]}) after {first[4]} s."
    return [Sheet("time-to-quality", title, Table(headers, rows), note, said, records=runs)] if rows else []


def _chart(evidence: Evidence, found: Sequence, name: str, axis: str, across: Callable[[Point], float]) -> Chart:
    shown = found[: drawing.MAX_PANELS]
    colours = evidence.colours

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, len(shown))
        for one, (title, lines) in zip(axes, shown, strict=True):
            for group, points in lines:
                xs, ys = [across(p) for p in points], [p.ppl.mean for p in points]
                colour = colours.colour(group.method)
                one.plot(xs, ys, color=colour, marker=colours.marker(group.method), markersize=3.5,
                         label=drawing.label(group.method))  # fmt: skip
                if any(p.ppl.error for p in points):
                    lower, upper = (
                        [y + sign * p.ppl.error for y, p in zip(ys, points, strict=True)] for sign in (-1, 1)
                    )
                    one.fill_between(xs, lower, upper, color=colour, alpha=0.18, linewidth=0)
            drawing.log_axis(one, "y", [p.ppl.mean for _, points in lines for p in points])
            one.set_xlabel(axis)
            one.set_ylabel("validation PPL")
            drawing.heading(one, title, min(2, len(shown)))
        drawing.legend(figure, axes)

    rows = [
        [title or "all", group.method, int(p.step), p.seconds, p.ppl]
        for title, lines in found
        for group, points in lines
        for p in points
    ]
    width, height = drawing.panel_size([title for title, _ in shown])
    title, best, ppl = min(
        ((title, group.method, points[-1].ppl) for title, lines in found for group, points in lines),
        key=lambda end: end[2].mean,
    )
    return Chart(
        name,
        f"Validation perplexity by {axis}",
        f"Line chart, {axis} across, validation perplexity up, one line per method.",
        f"Lowest at the end: {best}{f' ({title})' if title else ''} with a perplexity of {ppl}.",
        draw,
        Table(["setting", "method", "step", "training time (s)", "validation PPL"], rows),
        (width, height + drawing.legend_height(len({g.method for _, lines in shown for g, _ in lines}))),
        drawing.left_out(len(found)),
        [run for _, lines in found for group, _ in lines for run in group.records],
    )

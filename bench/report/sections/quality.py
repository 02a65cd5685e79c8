"""Perplexity against what it cost: bytes sent and training time, with the Pareto front."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import drawing
from bench.report.content import Chart, Section
from bench.report.evidence import Evidence
from bench.report.groups import Group, Panel, bytes_per_step, panels, representatives, train_seconds
from bench.report.palette import TEXT, Colours
from bench.report.values import Record, Spread, number
from common.tables import Table

_LEAD = (
    "Lower left is better. The line joins the methods that no other method beats on both axes (Pareto front of the "
    "means). Error bars: standard deviation over seeds; these runs do not tell apart two methods whose bars overlap."
)


@dataclass(frozen=True)
class Point:
    """One method: cost and perplexity."""

    group: Group
    cost: Spread
    ppl: Spread


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats or equals on both means, by rising cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost.mean, p.ppl.mean)):
        if not front or point.ppl.mean < front[-1].ppl.mean:
            front.append(point)
    return front


def section(evidence: Evidence) -> Section | None:
    """PPL against bytes, and against time; None when no two methods can be compared."""
    charts = [
        _chart(evidence, "ppl-against-bytes", "bytes sent per rank", "GB", _gigabytes, ("link",)),
        _chart(evidence, "ppl-against-time", "training time", "s", train_seconds, ()),
    ]
    drawn = [chart for chart in charts if chart]
    return Section("quality", "Quality against cost", _LEAD, drawn) if drawn else None


def _gigabytes(run: Record) -> float | None:
    sent, steps = bytes_per_step(run), number(run, "steps")
    return sent * steps / 1e9 if sent is not None and steps is not None else None


def _points(panel: Panel, cost: Callable[[Record], float | None]) -> list[Point]:
    pairs = ((group, group.spread(cost), group.ppl) for group in representatives(panel))
    return [Point(g, c, p) for g, c, p in pairs if c and p and math.isfinite(c.mean) and math.isfinite(p.mean)]


def _chart(
    evidence: Evidence, name: str, what: str, unit: str, cost: Callable[[Record], float | None], across: tuple[str, ...]
) -> Chart | None:
    found = [(panel.title, _points(panel, cost)) for panel in panels(evidence.groups, across)]
    found = [(title, points) for title, points in found if len(points) > 1]
    if not found:
        return None
    drawn = found[: drawing.MAX_PANELS]
    fronts = [pareto(points) for _, points in found]
    rows = [
        [title or "all", p.group.method, p.group.setting["link"], p.cost, p.ppl, p in front]
        for (title, points), front in zip(found, fronts, strict=True)
        for p in points
    ]
    colours = evidence.colours

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, len(drawn))
        for one, (title, points) in zip(axes, drawn, strict=True):
            _draw(one, points, colours)
            drawing.heading(one, title, min(2, len(drawn)))
            one.set_xlabel(f"{what} ({unit})")
            one.set_ylabel("validation PPL")
        drawing.legend(figure, axes)

    return Chart(
        name,
        f"Perplexity against {what}",
        f"Scatter plot, {what} ({unit}) across, validation perplexity up, one mark per method.",
        f"On the Pareto front{f' of {drawn[0][0]}' if drawn[0][0] else ''}: "
        f"{', '.join(p.group.method for p in fronts[0])}.",
        draw,
        Table(["setting", "method", "link", f"{what} ({unit})", "validation PPL", "on the front"], rows),
        _size(drawn),
        " ".join(filter(None, (drawing.left_out(len(found)), _of_many(evidence, across)))),
        [run for _, points in found for p in points for run in p.group.records],
    )


def _of_many(evidence: Evidence, across: tuple[str, ...]) -> str:
    """What a chart says that draws a method once though it ran on several links; "" where none did."""
    many = any(len(panel.groups) > len(representatives(panel)) for panel in panels(evidence.groups, across))
    return "A method that ran on several links is drawn once, from the link with most runs." if across and many else ""


def _size(drawn: Sequence[tuple[str, list[Point]]]) -> tuple[float, float]:
    width, height = drawing.panel_size([title for title, _ in drawn])
    return width, height + drawing.legend_height(len({p.group.method for _, points in drawn for p in points}))


def _draw(axes: Axes, points: Sequence[Point], colours: Colours) -> None:
    front = pareto(points)
    axes.plot([p.cost.mean for p in front], [p.ppl.mean for p in front], color=TEXT, linewidth=0.9, zorder=1)
    for p in points:
        method = p.group.method
        axes.errorbar(
            p.cost.mean, p.ppl.mean, xerr=p.cost.error or None, yerr=p.ppl.error or None, linestyle="none",
            color=colours.colour(method), marker=colours.marker(method), label=drawing.label(method),
        )  # fmt: skip
    drawing.log_axis(axes, "x", [p.cost.mean for p in points])
    axes.margins(0.08)

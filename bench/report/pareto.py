"""One picture a feature: what is saved across, what is left of the quality up, the best methods joined and named."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench.report import drawing, palette
from bench.report.content import Chart
from bench.report.features import Case, Feature, Point
from common.tables import Table

_SIDES = (("left", 5), ("right", -5), ("center", 0))
# offsets in points of a name from its point, and the edge of the name that is there: near ones first
_PLACES = [
    (across, sign * up, side, "bottom" if sign > 0 else "top")
    for up in (5, 16, 28, 40, 54, 68, 84)
    for sign in (1, -1)
    for side, across in _SIDES
]
_LEADER = {"arrowstyle": "-", "linewidth": 0.5, "color": palette.GREY, "shrinkA": 0, "shrinkB": 3}
_METHOD, _CONTROL = palette.hue(0), palette.hue(1)


def chart(feature: Feature, cases: Sequence[Case]) -> Chart:
    """The picture of a feature that has points.

    Args:
        feature: What is compared.
        cases: At least one, the strongest evidence first; as many as fit are drawn.
    """
    drawn = cases[: drawing.MAX_PANELS]
    rows = [
        [case.title, point.name, point.saving, point.quality, _error(point), point in front, point.control]
        for case in cases
        for front in [feature.front(case.points)]
        for point in case.points
    ]
    headers = ["case", "method", feature.saving.header, feature.quality.header, "± of it", "on the front", "control"]
    front = feature.front(drawn[0].points)
    width, height = drawing.panel_size([case.title for case in drawn])
    named = ", ".join(p.name for p in front)
    note = "" if len(cases) <= len(drawn) else f"Drawn: {len(drawn)} of {len(cases)} cases; the table below has all."
    return Chart(
        f"pareto-{feature.name}",
        f"{feature.title}: {feature.quality.header} against {feature.saving.header}",
        f"Scatter plot, {feature.saving.label} across, {feature.quality.label} up, one panel each for: "
        f"{'; '.join(case.title for case in drawn)}.",
        f"On the front ({drawn[0].title}): {named or 'nothing but controls'}.",
        lambda figure: draw(figure, feature, drawn),
        Table(headers, rows),
        (width, height + 0.2),
        f"Upper right is better. {note}".strip()
        if feature.quality.better > 0
        else f"Lower right is better. {note}".strip(),
        [record for case in cases for point in case.points for record in point.records],
    )


def draw(figure: Figure, feature: Feature, cases: Sequence[Case]) -> None:
    """Draw a panel for each case; methods on the front are named, the others are dots."""
    axes = drawing.grid(figure, len(cases))
    for one, case in zip(axes, cases, strict=True):
        _panel(one, feature, case)
        drawing.heading(one, case.title, min(2, len(cases)))
    drawing.legend(figure, axes)
    FigureCanvasAgg(figure)  # which can measure text, so that names find a free place
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the places are final
    for one, case in zip(axes, cases, strict=True):
        _name(one, feature.front(case.points), case.points)


def _error(point: Point) -> float | None:
    return sum(point.error) / 2 or None


def _panel(axes: Axes, feature: Feature, case: Case) -> None:
    front = feature.front(case.points)
    looks = {
        "other methods": ([p for p in case.points if not p.control and p not in front], palette.GREY, "o", 4.0),
        "controls": ([p for p in case.points if p.control], _CONTROL, "X", 6.0),
        "on the front": (front, _METHOD, "o", 6.0),
    }
    for label, (points, colour, marker, size) in looks.items():
        if points:
            axes.errorbar(
                [p.saving for p in points], [p.quality for p in points],
                yerr=list(zip(*(map(abs, p.error) for p in points), strict=True)) if any(map(_error, points)) else None,
                linestyle="-" if points is front else "none", linewidth=1.1, color=colour, marker=marker,
                markersize=size, label=label,
            )  # fmt: skip
    axes.plot(feature.saving.plain, feature.quality.plain, "*", color=palette.TEXT, markersize=9, label="left alone")
    axes.axhline(feature.tolerable, color=palette.TEXT, linestyle=":", linewidth=1.0, label=feature.rule)
    drawing.log_axis(axes, "x", [p.saving for p in case.points] if feature.saving.plain else [])
    qualities = [p.quality for p in case.points]
    if feature.quality.plain == 1.0:
        drawing.log_axis(axes, "y", [1.0, *qualities])
    elif not feature.quality.plain and max(map(abs, qualities)) > 10 * feature.tolerable:
        axes.set_yscale("symlog", linthresh=feature.tolerable)  # small changes matter as much as large ones
        drawing.plain_numbers(axes.yaxis)
    axes.set_xlabel(feature.saving.label)
    axes.set_ylabel(feature.quality.label)
    axes.margins(0.12)


def _name(axes: Axes, front: Sequence[Point], others: Sequence[Point]) -> None:
    """Names beside the points of the front, each in the nearest place where it covers no point and no other name."""
    inside, renderer = axes.get_window_extent(), axes.figure.canvas.get_renderer()
    dots = [axes.transData.transform((p.saving, p.quality)) for p in others]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    for point in front:
        text = drawing.label(point.name, 26)
        for across, up, side, edge in _PLACES:
            name = axes.annotate(
                text, (point.saving, point.quality), (across, up), textcoords="offset points", fontsize=7.5,
                ha=side, va=edge, arrowprops=_LEADER if abs(up) > 12 else None,
            )  # fmt: skip
            name.update_positions(renderer)
            box = Text.get_window_extent(name)
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                taken.append(box)
                break
            name.remove()
        else:
            axes.annotate(text, (point.saving, point.quality), (5, 5), textcoords="offset points", fontsize=7.5)

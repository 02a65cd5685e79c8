"""Speed-up against link rate, and the rate at which a method stops paying."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from matplotlib.figure import Figure

from bench.report import drawing
from bench.report.content import Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.groups import Group, panels
from bench.report.link import modelled
from bench.report.palette import TEXT
from bench.report.values import Spread, quantity, text
from common.tables import Table

_LEAD = (
    "Speed-up per step over the uncompressed run on the same link. Above the line at 1 compression pays. The rate at "
    "which it stops paying is read between two measured rates (logarithmic interpolation), never beyond them."
)
Line = list[tuple[float, Spread, Group]]


def break_even(rates: Sequence[float], speedups: Sequence[float]) -> float | None:
    """Rate at which the speed-up falls through 1, between measured rates; None when it does not.

    Args:
        rates: Rising link rates in bit/s.
        speedups: Speed-up at each.
    """
    for (slow, above), (fast, below) in itertools.pairwise(zip(rates, speedups, strict=True)):
        if above > 1 >= below:
            share = (above - 1) / (above - below)
            return math.exp(math.log(slow) + share * (math.log(fast) - math.log(slow)))
    return None


def section(evidence: Evidence) -> Section | None:
    """The curve of each method; None without a baseline at two link rates."""
    lines = _lines(evidence.groups)
    if not lines:
        return None
    settings = list(dict.fromkeys(setting for setting, _ in lines))
    shown = settings[: drawing.MAX_PANELS]
    colours = evidence.colours

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, len(shown), sharey=True)
        for one, setting in zip(axes, shown, strict=True):
            one.axhline(1.0, color=TEXT, linewidth=0.9)
            for (where, method), line in lines.items():
                if where == setting:
                    one.errorbar(
                        [rate / 1e6 for rate, _, _ in line], [s.mean for _, s, _ in line],
                        yerr=[s.error for _, s, _ in line], color=colours.colour(method),
                        marker=colours.marker(method), label=drawing.label(method),
                    )  # fmt: skip
            drawing.log_axis(
                one, "x", [rate / 1e6 for (w, _), line in lines.items() if w == setting for rate, *_ in line]
            )
            one.set_xlabel("link rate (Mbit/s)")
            one.set_ylabel("speed-up over uncompressed (×)")
            drawing.heading(one, setting, min(2, len(shown)))
        drawing.legend(figure, axes)

    points = [
        [w or "all", m, rate / 1e6, s, g.setting["link"]] for (w, m), line in lines.items() for rate, s, g in line
    ]
    best = max(points, key=lambda row: row[3].mean)
    width, height = drawing.panel_size(shown)
    runs = [run for line in lines.values() for *_, group in line for run in group.records]
    chart = Chart(
        "speedup-by-rate",
        "Speed-up against link rate",
        "Line chart, link rate in Mbit/s across (logarithmic), speed-up over the uncompressed run up, one line per "
        "method.",
        f"Highest: {best[1]} with {best[3]} × at {best[2]:g} Mbit/s.",
        draw,
        Table(["setting", "method", "link rate (Mbit/s)", "speed-up (×)", "link"], points),
        (width, height + drawing.legend_height(len({m for _, m in lines}))),
        drawing.left_out(len(settings)),
        runs,
    )
    rows = [[where or "all", method, _stop(line)] for (where, method), line in lines.items()]
    table = Table(["setting", "method", "stops paying at"], rows)
    pays = sum(line[-1][1].mean > 1 for line in lines.values())
    said = f"{pays} of {len(lines)} still pay on the fastest link that they were measured on."
    stops = Sheet("break-even", "Link rate at which a method stops paying", table, verdict=said, records=runs)
    return Section("rates", "When compression pays", _LEAD, [chart, stops])


def _lines(groups: Sequence[Group]) -> dict[tuple[str, str], Line]:
    """Speed-ups of each compressed method at two rates or more, by setting, kind of link and method."""
    lines: dict[tuple[str, str], Line] = defaultdict(list)
    for wide in panels(groups, across=("link",)):
        for panel in panels(wide.groups):
            for group in panel.groups:
                speedup = panel.speedup(group)
                if group.rate and speedup and not group.uncompressed and math.isfinite(speedup.mean):
                    lines[", ".join(filter(None, (wide.title, _kind(group)))), group.method].append(
                        (group.rate, speedup, group)
                    )
    return {key: sorted(line, key=lambda p: p[0]) for key, line in lines.items() if len({p[0] for p in line}) > 1}


def _kind(group: Group) -> str:
    """What links of several rates must have in common."""
    one = group.records[0]
    delay = f"delay {text(one['link_delay'])}" if one.get("link_delay") is not None else ""
    return ", ".join(filter(None, (delay, "modelled" if modelled(one) else "")))


def _stop(line: Line) -> str:
    rate = break_even([p[0] for p in line], [p[1].mean for p in line])
    if rate is not None:
        return f"about {quantity(rate, 'bit/s')}"
    if line[-1][1].mean > 1:
        return f"pays up to {quantity(line[-1][0], 'bit/s')}, the fastest measured"
    return f"does not pay at {quantity(line[0][0], 'bit/s')}, the slowest measured"

"""Throughput from one rank to many."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from bench.report import drawing
from bench.report.content import Chart, Section
from bench.report.evidence import Evidence
from bench.report.groups import Group, panels
from bench.report.link import modelled
from bench.report.palette import TEXT
from bench.report.values import Record, Spread, ratio
from common.tables import NOT_RECORDED, Table

_LEAD = (
    "Tokens per second of all ranks together; the batch per rank stays the same, so the work grows with the ranks. "
    "Efficiency is the throughput over ranks times the throughput of the smallest run. Ranks that share one machine's "
    "cores also share its arithmetic: such a curve shows contention, not what more machines would do."
)


@dataclass(frozen=True)
class Line:
    """Throughput of one method at several numbers of ranks, rising."""

    setting: str
    method: str
    points: list[tuple[int, Spread]]
    records: list[Record]

    def efficiency(self, index: int) -> Spread | None:
        """Share of perfect scaling at a point."""
        (first, base), (ranks, value) = self.points[0], self.points[index]
        return ratio(value, base.scaled(ranks / first))


def lines(groups: Sequence[Group]) -> list[Line]:
    """One line per method, setting and link that ran with two or more numbers of ranks.

    A single rank uses no link, so its run is the start of the lines on all links.
    """
    found = []
    for wide in panels(
        [g for g in groups if _ranks(g) and g.spread("tokens_per_s") and not _modelled(g)], across=("ranks", "link")
    ):
        methods: dict[str, dict[str, dict[int, Spread]]] = defaultdict(lambda: defaultdict(dict))
        runs: dict[str, list[Record]] = defaultdict(list)
        for group in wide.groups:
            link = "" if _ranks(group) == 1 else group.setting["link"]
            value = group.spread("tokens_per_s")
            if value and math.isfinite(value.mean):
                methods[group.method][link][_ranks(group)] = value
                runs[group.method] += group.records
        for method, links in methods.items():
            single = links.pop("", {})
            found += [
                Line(_title(wide.title, link), method, sorted({**single, **points}.items()), runs[method])
                for link, points in links.items()
                if len({**single, **points}) > 1
            ]
    return found


def _modelled(group: Group) -> bool:
    """Whether its ranks had no link: their tokens per second are those without it."""
    return _ranks(group) != 1 and any(map(modelled, group.records))


def _title(setting: str, link: str) -> str:
    return ", ".join(filter(None, (setting, "" if link == NOT_RECORDED else "no link" if link == "none" else link)))


def _ranks(group: Group) -> int:
    world = group.records[0].get("world_size")
    return world if isinstance(world, int) else 0


def section(evidence: Evidence) -> Section | None:
    """Throughput against ranks; None when nothing ran with two numbers of ranks."""
    found = lines(evidence.groups)
    if not found:
        return None
    settings = list(dict.fromkeys(line.setting for line in found))
    shown, colours = settings[: drawing.MAX_PANELS], evidence.colours

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, len(shown))
        for one, setting in zip(axes, shown, strict=True):
            here = [line for line in found if line.setting == setting]
            first, base = max((line.points[0] for line in here), key=lambda p: p[1].mean)
            ranks = sorted({r for line in here for r, _ in line.points})
            one.plot(ranks, [base.mean * r / first for r in ranks], color=TEXT, linestyle=":", label="perfect scaling")
            for line in here:
                one.errorbar(
                    [r for r, _ in line.points], [s.mean for _, s in line.points],
                    yerr=[s.error for _, s in line.points], color=colours.colour(line.method),
                    marker=colours.marker(line.method), label=drawing.label(line.method),
                )  # fmt: skip
            one.set_xticks(ranks)
            one.set_ylim(bottom=0)
            drawing.plain_numbers(one.yaxis)
            one.set_xlabel("ranks")
            one.set_ylabel("throughput (tokens/s)")
            drawing.heading(one, setting, min(2, len(shown)))
        drawing.legend(figure, axes)

    rows = [
        [line.setting or "all", line.method, ranks, value, line.efficiency(index)]
        for line in found
        for index, (ranks, value) in enumerate(line.points)
    ]
    best = max(rows, key=lambda row: row[3].mean)
    width, height = drawing.panel_size(shown)
    chart = Chart(
        "scaling",
        "Throughput against number of ranks",
        "Line chart, number of ranks across, tokens per second up, one line per method, a dotted line for perfect "
        "scaling.",
        f"Highest: {best[1]} with {best[3].mean:,.0f} tokens/s on {best[2]} ranks.",
        draw,
        Table(["setting", "method", "ranks", "throughput (tokens/s)", "efficiency"], rows),
        (width, height + drawing.legend_height(1 + len({line.method for line in found}))),
        drawing.left_out(len(settings)),
        [run for line in found for run in line.records],
    )
    return Section("scaling", "Scaling", _LEAD, [chart])

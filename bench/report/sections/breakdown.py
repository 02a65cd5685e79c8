"""Where the step time goes, beside the time it could have taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import drawing
from bench.report.content import Chart, Section
from bench.report.evidence import Evidence
from bench.report.groups import Group, panels
from bench.report.link import modelled, step_ms
from bench.report.palette import PHASES, TEXT
from bench.report.values import Record, Spread, per_step, total
from common.tables import Table

_LEAD = (
    "Mean optimizer step. Encode, wire and decode are timed inside the collectives, the wire including the wait for "
    "slower ranks; compute is the rest of the step. The black mark is the ideal step: compute without communication "
    "plus bytes over bandwidth, nothing else. A bar that ends left of its mark would be too good to be true."
)
_FIELDS = {"encode": "compress_time_ms", "wire": "comm_time_ms_total", "decode": "decompress_time_ms"}


@dataclass(frozen=True)
class Bar:
    """Step time of one group in ms."""

    label: str
    phases: dict[str, float]
    step: Spread
    bound: float | None
    records: list[Record]


def phases(run: Record) -> dict[str, float] | None:
    """Milliseconds of a step by phase; None unless the run recorded all of them."""
    step = step_ms(run, "mean") if not modelled(run) else None  # the wire of this machine says nothing of that link
    parts = {phase: per_step(run, field) for phase, field in _FIELDS.items()}
    known = total(list(parts.values()))
    if step is None or known is None:
        return None
    # Where phases overlap compute they can add up to more than the step; then nothing is left for compute to be read.
    return {"compute": max(step - known, 0.0), **{phase: value for phase, value in parts.items() if value is not None}}


def section(evidence: Evidence) -> Section | None:
    """Stacked bars of step time; None when no run timed its communication."""
    found = []
    for panel in panels(evidence.groups):
        bars = [bar for group in panel.groups if (bar := _bar(group))]
        if bars:
            found.append((panel.title, bars))
    if not found:
        return None
    shown = found[: drawing.MAX_PANELS]
    headers = ["setting", "method", *(f"{phase} (ms)" for phase in PHASES), "step, mean (ms)", "ideal step (ms)"]
    rows = [
        [title or "all", bar.label, *(bar.phases[phase] for phase in PHASES), bar.step, bar.bound]
        for title, bars in found
        for bar in bars
    ]
    title, slowest = max(((title, bar) for title, bars in found for bar in bars), key=lambda pair: pair[1].step.mean)
    where = f" ({title})" if title else ""
    chart = Chart(
        "step-time",
        "Step time by phase",
        "Stacked bars of mean step time in milliseconds by compute, encode, wire and decode, one bar per method.",
        f"Slowest: {slowest.label}{where} with {slowest.step.mean:,.0f} ms a step, of which "
        f"{slowest.phases['wire']:,.0f} ms on the wire.",
        lambda figure: _draw(figure, shown),
        Table(headers, rows),
        (8.0, 0.9 + sum(drawing.spread_out([len(bars) for _, bars in shown], [title for title, _ in shown]))),
        drawing.left_out(len(found)),
        [run for _, bars in found for bar in bars for run in bar.records],
    )
    return Section("step-time", "Where the step time goes", _LEAD, [chart])


def _bar(group: Group) -> Bar | None:
    parts = [found for run in group.records if (found := phases(run))]
    step = group.spread("step_time_ms_mean")
    if not parts or step is None or not math.isfinite(step.mean):
        return None
    mean = {phase: sum(part[phase] for part in parts) / len(parts) for phase in PHASES}
    bound = group.spread("bound_step_time_ms")
    return Bar(group.method, mean, step, bound.mean if bound else None, group.records)


def _draw(figure: Figure, shown: Sequence[tuple[str, Sequence[Bar]]]) -> None:
    heights = drawing.spread_out([len(bars) for _, bars in shown], [title for title, _ in shown])
    axes = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0].tolist()
    for one, (title, bars) in zip(axes, shown, strict=True):
        _bars(one, bars)
        drawing.heading(one, title, 1)
    axes[-1].set_xlabel("step time (ms)")
    drawing.legend(figure, axes, columns=6)


def _bars(axes: Axes, bars: Sequence[Bar]) -> None:
    rows = range(len(bars))
    left = [0.0] * len(bars)
    for phase, colour in PHASES.items():
        widths = [bar.phases[phase] for bar in bars]
        drawing.bars(axes, rows, widths, colour, left, 0.62, lying=True, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.errorbar(
        [bar.step.mean for bar in bars], rows, xerr=[bar.step.error for bar in bars],
        linestyle="none", color=TEXT, linewidth=1.0,
    )  # fmt: skip
    bounds = [(row, bar.bound) for row, bar in zip(rows, bars, strict=True) if bar.bound is not None]
    if bounds:
        axes.scatter([b for _, b in bounds], [r for r, _ in bounds], marker="|", s=160, color=TEXT, linewidths=2.2,
                     label="ideal step", zorder=4)  # fmt: skip
    axes.set_yticks(rows, [drawing.label(bar.label) for bar in bars])
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    drawing.plain_numbers(axes.xaxis)

"""What token pruning costs in quality, against the prefill time that is left: a frontier of scorers for every task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import number
from common.tables import Table

_LEAD = (
    "Lower left is better: less of the unpruned model's prefill time, less loss. A line joins the budgets of a scorer; "
    "error bars are 95 % intervals over samples. Oracles (grey) have seen the response: ceilings, not methods."
)
_COLUMNS = {
    "task": "task",
    "scorer": "scorer",
    "keep": "keep per stage",
    "nll_rise": "rise of the loss (nats)",
    "nll_rise_low": "95 % from",
    "nll_rise_high": "to",
    "accuracy": "accuracy",
    "kept": "left at the end (share)",
    "prefill_share": "prefill time (share)",
}


@dataclass(frozen=True)
class Point:
    """One scorer at one budget; None where not recorded."""

    task: str
    scorer: str
    keep: float | None
    nll_rise: float | None
    nll_rise_low: float | None
    nll_rise_high: float | None
    accuracy: float | None
    kept: float | None
    prefill_share: float | None
    oracle: bool


def parse(block: Any) -> list[Point]:
    """The record's block `token_quality`: a row for each task, scorer and share kept."""
    return [_point(entry) for entry in block]


def _point(entry: Mapping[str, Any]) -> Point:
    pruned, whole = number(entry, "prefill_ms"), number(entry, "prefill_ms_unpruned")
    share = pruned / whole if pruned and whole else None
    measured = {name: number(entry, name) for name in list(_COLUMNS)[2:-1]}
    task, scorer, oracle = str(entry["task"]), str(entry["scorer"]), bool(entry.get("oracle"))
    return Point(task, scorer, prefill_share=share, oracle=oracle, **measured)


def section(evidence: Evidence) -> Section | None:
    """A chart for every run that compared scorers, and a table; None when there is none."""
    found = evidence.blocks("token_quality", parse)
    if not found:
        return None
    shown = found[-drawing.MAX_RUNS :]
    blocks: list[Block] = []
    for index, (name, points) in enumerate(shown):
        drawn = [p for p in points if p.nll_rise is not None and p.prefill_share is not None and p.keep is not None]
        if drawn:
            blocks.append(_chart(index, name, drawn))
    rows = [[name, *(getattr(p, field) for field in _COLUMNS)] for name, points in shown for p in points]
    table = Table(["run", *_COLUMNS.values()], rows)
    blocks.append(Sheet("frontier-table", "What pruning costs", table, drawing.last_runs(len(found))))
    return Section("frontier", "Quality of pruned prompts", _LEAD, blocks)


def _chart(index: int, name: str, points: list[Point]) -> Chart:
    tasks = list(dict.fromkeys(p.task for p in points))[: drawing.MAX_PANELS]

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, len(tasks))
        for one, task in zip(axes, tasks, strict=True):
            _draw(one, [p for p in points if p.task == task])
            drawing.heading(one, task)
        drawing.legend(figure, axes)

    best = min(points, key=lambda p: p.nll_rise or 0)
    headers = ["task", "scorer", "keep per stage", "prefill time (share)", "rise of the loss (nats)"]
    width, height = drawing.panel_size(len(tasks))
    return Chart(
        f"frontier-{index}",
        f"Loss against prefill time: {name}",
        "Scatter plot for each task, prefill time as a share of the unpruned model's across, rise of the loss in nats "
        f"per token up, one colour and marker per scorer. Lowest: {best.scorer} on {best.task} at keep {best.keep:g}.",
        draw,
        Table(headers, [[p.task, p.scorer, p.keep, p.prefill_share, p.nll_rise] for p in points]),
        (width, height + 0.5),
    )


def _draw(axes: Axes, points: list[Point]) -> None:
    axes.axhline(0.0, color=palette.TEXT, linewidth=0.9)
    colours = palette.Colours(p.scorer for p in points if not p.oracle)  # those that it does not know are grey
    for name in dict.fromkeys(p.scorer for p in points):
        mine = sorted((p for p in points if p.scorer == name), key=lambda p: p.keep or 0.0)
        axes.errorbar(
            [p.prefill_share or 0.0 for p in mine],
            [p.nll_rise or 0.0 for p in mine],
            yerr=[[_gap(p.nll_rise, p.nll_rise_low) for p in mine], [_gap(p.nll_rise_high, p.nll_rise) for p in mine]],
            color=colours.colour(name), marker=colours.marker(name), linewidth=1.1, label=drawing.label(name),
            linestyle=":" if mine[0].oracle else "-",
        )  # fmt: skip
    axes.set_xlabel("prefill time (share of the unpruned model's)")
    axes.set_ylabel("rise of the loss (nats/token)")
    axes.margins(0.08)


def _gap(upper: float | None, lower: float | None) -> float:
    return 0.0 if upper is None or lower is None else max(0.0, upper - lower)

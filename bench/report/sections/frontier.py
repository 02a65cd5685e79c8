"""What token pruning costs in quality, against the prefill time that is left: a frontier of scorers for every task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import Record, budget, number
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
    "right": "right answers (share)",
    "kept_right": "of the unpruned's (share)",
    "bound": "FLOP bound (×)",
    "kv_share": "cache (share)",
    "kept": "left at the end (share)",
    "prefill_share": "prefill time (share)",
}

_WHOLE = ("unpruned", "answer_left_out", "sentence_left_out")  # read without pruning


@dataclass(frozen=True)
class Point:
    """One scorer at one budget, several budget being text; None where not recorded."""

    task: str
    scorer: str
    keep: float | str | None
    nll_rise: float | None
    nll_rise_low: float | None
    nll_rise_high: float | None
    accuracy: float | None
    right: float | None
    kept_right: float | None
    bound: float | None
    kv_share: float | None
    kept: float | None
    prefill_share: float | None
    oracle: bool


def parse(block: Any) -> list[Point]:
    """The record's block `token_quality`: a row for each task, scorer and share kept."""
    return [_point(entry) for entry in block]


def _point(entry: Mapping[str, Any]) -> Point:
    pruned, whole = number(entry, "prefill_ms"), number(entry, "prefill_ms_unpruned")
    share = pruned / whole if pruned and whole else None
    measured = {name: number(entry, name) for name in list(_COLUMNS)[3:-1]}
    keep: float | str | None = number(entry, "keep")
    keep = keep if keep is not None else budget(entry).removeprefix("keep ") or None
    task, scorer, oracle = str(entry["task"]), str(entry["scorer"]), bool(entry.get("oracle"))
    return Point(task, scorer, keep, prefill_share=share, oracle=oracle, **measured)


def section(evidence: Evidence) -> Section | None:
    """A chart for every run that compared scorers, and a table; None when there is none."""
    found = evidence.blocks("token_quality", parse)
    if not found:
        return None
    shown = found[-drawing.MAX_RUNS :]
    blocks: list[Block] = []
    runs = evidence.having("token_quality")
    for index, (name, points) in enumerate(shown):
        drawn = [p for p in points if p.nll_rise is not None and p.prefill_share is not None and p.scorer not in _WHOLE]
        if drawn:
            blocks.append(_chart(index, name, drawn, runs))
    rows = [[name, *(getattr(p, field) for field in _COLUMNS)] for name, points in shown for p in points]
    table = Table(["run", *_COLUMNS.values()], rows)
    said = f"{len(rows)} arms, {len({p.scorer for _, points in shown for p in points})} scorers."
    best = max((p for _, ps in shown for p in ps if p.kept_right is not None and p.scorer not in _WHOLE),
               key=lambda p: p.kept_right or 0.0, default=None)  # fmt: skip
    if best:
        said += f" Most answers stay with {best.scorer} on {best.task}: {best.kept_right:.0%}."
    least = min((p for _, ps in shown for p in ps if _is_method(p)), key=lambda p: p.nll_rise or 0.0, default=None)
    if least:
        said += f" The loss rises least with {least.scorer} on {least.task}{_at(least)}: "
        said += f"{least.nll_rise:.3g} nats a token."
    blocks.append(
        Sheet("frontier-table", "What pruning costs", table, drawing.last_runs(len(found)), said, records=runs)
    )
    return Section("frontier", "Quality of pruned prompts", _LEAD, blocks)


def _is_method(point: Point) -> bool:
    return point.scorer not in _WHOLE and point.nll_rise is not None and not point.oracle


def _at(point: Point) -> str:
    said = budget({"keep": point.keep})
    return f" at {said.removeprefix('keep ') if said.endswith('tokens') else said}" if said else ""


def _chart(index: int, name: str, points: list[Point], records: Sequence[Record]) -> Chart:
    every = list(dict.fromkeys(p.task for p in points))
    tasks = every[: drawing.MAX_PANELS]

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, len(tasks))
        for one, task in zip(axes, tasks, strict=True):
            _draw(one, [p for p in points if p.task == task])
            drawing.heading(one, task, min(2, len(tasks)))
        drawing.legend(figure, axes)

    methods = [p for p in points if _is_method(p)] or points
    best = min(methods, key=lambda p: p.nll_rise or 0)
    headers = ["task", "scorer", "keep per stage", "prefill time (share)", "rise of the loss (nats)"]
    width, height = drawing.panel_size(tasks)
    return Chart(
        f"frontier-{index}",
        f"Loss against prefill time: {name}",
        "Scatter plot for each task, prefill time as a share of the unpruned model's across, rise of the loss in nats "
        "per token up, one colour and marker per scorer.",
        f"Lowest: {best.scorer} on {best.task}{_at(best)} with {best.nll_rise:.3g} nats a token.",
        draw,
        Table(headers, [[p.task, p.scorer, p.keep, p.prefill_share, p.nll_rise] for p in points]),
        (width, height + drawing.legend_height(len({p.scorer for p in points})) + 0.2),
        drawing.left_out(len(every)),
        records,
    )


def _draw(axes: Axes, points: list[Point]) -> None:
    axes.axhline(0.0, color=palette.TEXT, linewidth=0.9)
    colours = palette.Colours(p.scorer for p in points if not p.oracle)  # those that it does not know are grey
    for name in dict.fromkeys(p.scorer for p in points):
        mine = sorted((p for p in points if p.scorer == name), key=lambda p: p.prefill_share or 0.0)
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

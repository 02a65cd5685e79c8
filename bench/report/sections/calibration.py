"""Which layers of a model look up what is asked for, and what calibration made of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import Record
from common.tables import Table

_LEAD = (
    "How much of a prompt must stay for a planted answer to stay whole, by the attention that the prompt's end pays in "
    "each layer: 95 % of the answers need no more. Low points to the left save most. It is measured "
    "on planted facts; what is asked otherwise may need more."
)


def parse(block: Any) -> Mapping[str, Any]:
    """The record's block `calibration`, with what this section reads."""
    names = ("needed", "layers", "keep", "tried", "window", "pool")
    return {name: block[name] for name in names}


def section(evidence: Evidence) -> Section | None:
    """A chart of layers and a table of what was tried; None when no run calibrated."""
    found = evidence.blocks("calibration", parse)
    if not found:
        return None
    blocks: list[Block] = []
    for index, (name, block) in enumerate(found[-drawing.MAX_RUNS :]):
        runs = evidence.having("calibration")
        blocks += [_chart(index, name, block, runs), _tried(index, name, block, runs)]
    lead = f"{_LEAD} {drawing.last_runs(len(found))}".strip()
    return Section("calibration", "Where a model looks things up", lead, blocks)


def _chart(index: int, name: str, block: Mapping[str, Any], records: Sequence[Record]) -> Chart:
    needed = block["needed"]
    layers = [entry["layer"] for entry in needed]
    best, whole = ([entry[key] for entry in needed] for key in ("share", "all_heads"))
    heads = ["all" if entry["heads"] is None else ", ".join(map(str, entry["heads"])) for entry in needed]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(layers, whole, "o--", color=palette.GREY, label="all heads", markersize=3.5)
        axes.plot(layers, best, "o-", color=palette.hue(0), label="its best heads")
        for after, keep in zip(block["layers"], block["keep"], strict=True):
            label = "kept after the stage before it" if after == block["layers"][0] else None
            drawing.bars(axes, [after + 1], [keep], palette.hue(1), width=0.7, alpha=0.35, label=label)
        axes.set(xlabel="layer whose attention is read", ylabel="share of the context", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend()

    least = min(needed, key=lambda entry: entry["share"])
    summary = (
        "Line chart, layers across, share of the context needed up, 0 to 100 %; with a layer's best heads and all."
    )
    verdict = (
        f"Layer {least['layer']} needs least: {least['share']:.0%} of the context with its best heads, "
        f"{least['all_heads']:.0%} with all. Chosen: after layers {block['layers']}, keep {block['keep']}."
    )
    data = Table(
        ["layer", "best heads", "needed", "needed by all heads"], [*zip(layers, heads, best, whole, strict=True)]
    )
    title = f"Context needed by layer: {name}"
    return Chart(f"calibration-{index}", title, summary, verdict, draw, data, records=records)


def _tried(index: int, name: str, block: Mapping[str, Any], records: Sequence[Record]) -> Sheet:
    rows = [
        [row["scorer"], str(row["layers"]), str(row["keep"]), row["bound"], row["right"], row["unpruned"]]
        for row in block["tried"]
    ]
    headers = ["scorer", "after layers", "keep", "FLOP bound (×)", "right answers", "unpruned"]
    note = (
        f"Window {block['window']}, mean over {block['pool']} neighbours. The first with most right answers is chosen."
    )
    best = max(block["tried"], key=lambda row: row["right"], default=None)
    said = f"Of {len(rows)} tried, most right answers: {best['right']} of {best['unpruned']}." if best else ""
    title = f"Schedules tried out on further facts: {name}"
    return Sheet(f"calibration-tried-{index}", title, Table(headers, rows), note, said, records=records)

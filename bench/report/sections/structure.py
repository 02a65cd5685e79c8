"""What structured pruning left of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import Record, number
from common.tables import Table

_LEAD = (
    "Query-head groups (with their keys and values) and feed-forward channels that each layer keeps. PPL before and "
    "after is without recovery unless the record says otherwise."
)
_SPEED = {
    "phase": "phase",
    "batch": "batch",
    "dense_ms": "dense (ms)",
    "pruned_ms": "pruned (ms)",
    "speedup": "speed-up (×)",
    "speedup_spread": "± (×)",
    "flop_bound": "FLOP bound (×)",
    "byte_bound": "byte bound (×)",
    "suspicious": "beyond its bounds",
}


@dataclass(frozen=True)
class Layer:
    """Groups and channels of one layer, before and kept."""

    layer: int
    groups: int
    groups_kept: int
    channels: int
    channels_kept: int


def parse(block: Any) -> tuple[list[Layer], Mapping[str, Any]]:
    """The layers of the record's block `structure`, and its single values."""
    names = ("layer", "groups", "groups_kept", "channels", "channels_kept")
    layers = [Layer(*(int(entry[name]) for name in names)) for entry in block.get("layers") or []]
    single = {name: value for name, value in block.items() if value is None or isinstance(value, str | int | float)}
    return layers, single


def parse_speed(block: Any) -> list[list[Any]]:
    """The record's block `inference`, a row for each phase and batch, as in `_SPEED`."""
    return [[entry["phase"], *(entry.get(name) for name in list(_SPEED)[1:])] for entry in block["rows"]]


def section(evidence: Evidence) -> Section | None:
    """Bars per layer, tables of before and after and of speed; None when no run pruned structure."""
    found, speed = evidence.blocks("structure", parse), evidence.blocks("inference", parse_speed)
    blocks: list[Block] = _kept(found, evidence.having("structure")) if found else []
    if speed:
        rows = [[name, *row] for name, measured in speed[-drawing.MAX_RUNS :] for row in measured]
        table = Table(["run", *_SPEED.values()], rows)
        faster = [row[list(_SPEED).index("speedup") + 1] for row in rows]
        known = [value for value in faster if isinstance(value, int | float)]
        said = (
            f"{min(known):.2f} × to {max(known):.2f} × as fast as the dense model."
            if known
            else "No speed-up recorded."
        )
        note, runs = drawing.last_runs(len(speed)), evidence.having("inference")
        blocks.append(Sheet("structure-speed", "Speed beside the dense model", table, note, said, records=runs))
    return Section("structure", "Structured pruning", _LEAD, blocks) if blocks else None


def _kept(found: Sequence[tuple[str, tuple[list[Layer], Mapping[str, Any]]]], records: Sequence[Record]) -> list[Block]:
    names = list(dict.fromkeys(key for _, (_, single) in found for key in single))
    names = [name for name in names if any(single.get(name) is not None for _, (_, single) in found)]
    rows = [[name, *(single.get(key) for key in names), _share(single)] for name, (_, single) in found]
    table = Table(["run", *(name.replace("_", " ") for name in names), "parameters left (%)"], rows)
    drawn = [(name, layers) for name, (layers, _) in found if layers]
    charts = [_chart(index, name, layers, records) for index, (name, layers) in enumerate(drawn[-drawing.MAX_RUNS :])]
    note, said = drawing.last_runs(len(drawn)), f"{len(found)} runs pruned structure."
    costs = [
        (number(single, "ppl_after") or 0.0) / before
        for _, (_, single) in found
        if (before := number(single, "ppl_before")) and number(single, "ppl_after") is not None
    ]
    if costs:
        said = f"Perplexity after pruning is {min(costs):.2f} × to {max(costs):.2f} × that before."
    return [Sheet("structure", "Before and after", table, note, said, records=records), *charts]


def _share(single: Mapping[str, Any]) -> float | None:
    before, after = number(single, "parameters_before"), number(single, "parameters_after")
    return 100 * after / before if before and after is not None else None


def _chart(index: int, name: str, layers: list[Layer], records: Sequence[Record]) -> Chart:
    groups, channels = (sum(getattr(one, field) for one in layers) for field in ("groups_kept", "channels_kept"))
    of_groups, of_channels = sum(one.groups for one in layers), sum(one.channels for one in layers)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _bars(left, layers, "groups", palette.hue(0))
        _bars(right, layers, "channels", palette.hue(1))

    return Chart(
        f"structure-{index}",
        f"Kept per layer: {name}",
        f"Two bar charts over {len(layers)} layers: query-head groups, and feed-forward channels, before and kept.",
        f"Kept in all: {groups:,} of {of_groups:,} groups, {channels:,} of {of_channels:,} channels.",
        draw,
        Table(
            ["layer", "groups", "groups kept", "channels", "channels kept"],
            [[one.layer, one.groups, one.groups_kept, one.channels, one.channels_kept] for one in layers],
        ),
        (8.0, 3.0),
        records=records,
    )


def _bars(axes: Axes, layers: list[Layer], what: str, colour: str) -> None:
    places = [one.layer for one in layers]
    drawing.bars(axes, places, [getattr(one, what) for one in layers], palette.GRID, label="before")
    drawing.bars(axes, places, [getattr(one, f"{what}_kept") for one in layers], colour, label="kept")
    axes.set_xlabel("layer")
    axes.set_ylabel("query-head groups" if what == "groups" else "feed-forward channels")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", ncols=2)

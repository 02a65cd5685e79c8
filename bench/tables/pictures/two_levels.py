"""What crosses the link between two hosts."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_LEVELS = {
    "flat_none": "fp32",
    "flat_int8": "int8 gradients",
    "flat_two_hops": "int8 gradients in two hops",
    "flat_within": "int8, backward gathers inside hosts",
    "flat_int8_both": "int8 gradients and parameters",
    "flat_differences": "two hops, int4 parameter differences",
    "hsdp_none": "fp32 between",
    "hsdp_int8": "int8 between",
    "hsdp_int4": "int4 between",
    "ddp_none": "fp32",
    "ddp_int8": "int8, one group",
    "ddp_two_int8": "int8 between, reduced inside first",
}


_GROUPS = {"flat": "one group", "hsdp": "sharded inside hosts", "ddp": "whole on each rank"}


def _take(folder: Path) -> Numbers:
    """Bytes between two hosts and time of a step, by method."""
    found = figures_of(folder, "two_levels.jsonl")
    rows = {method: found[f"between-hosts-{method}"] for method in _LEVELS}
    return {method: {"MB": row["value"], "s": row["details"]["step_ms"] / 1e3} for method, row in rows.items()}


def _draw(figure: Figure, numbers: Numbers) -> None:
    titles = {"MB": "MB from host to host in a step", "s": "seconds of a step, 100 Mbit/s"}
    groups = [method.partition("_")[0] for method in numbers]
    colours = {"flat": GREY, "hsdp": hue(0), "ddp": hue(1)}
    for axes, (field, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        # groups stand apart, and methods of two groups have the same names
        places = [place + 0.6 * list(colours).index(group) for place, group in enumerate(groups)]
        values = [one[field] for one in numbers.values()]
        bars = axes.barh(places, values, color=[colours[group] for group in groups])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.margins(x=0.12)
        axes.grid(False, axis="y")
        axes.set_title(title)
        axes.set_yticks(places, [_LEVELS[method] for method in numbers], fontsize=8)
    axes.invert_yaxis()
    shown = [Patch(color=colours[group], label=label) for group, label in _GROUPS.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown))


PICTURE = Picture(
    30,
    "Two hosts of two ranks, 100 Mbit/s between them: what crosses the link, and how long a step takes, when the "
    "ranks are one group, when each host holds a sharded copy, and when each rank holds a whole one.",
    _take,
    _draw,
    "gradient_compression.md",
    (8.4, 3.6),
)

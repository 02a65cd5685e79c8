"""Which heads and channels go."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.report.palette import hue
from bench.tables.compare import lookup
from bench.tables.pictures.picture import Numbers, Picture, figures_of


def _take(folder: Path) -> Numbers:
    """Perplexity by importance and allocation, a quarter removed, before recovery; and the dense model's."""
    cells = [one for one in figures_of(folder, "ablation.jsonl").values() if lookup(one, "details.when") == "before"]
    quarter = [one for one in cells if one["details"]["budget"] == "25%"]
    rows: Numbers = {"dense": quarter[0]["details"]["dense_ppl"], "cells": {}}
    for one in quarter:
        name, allocation = (one["details"][field].strip("`") for field in ("importance", "allocation"))
        rows["cells"].setdefault(name, {})[allocation] = one["value"]
    return rows


def _draw(figure: Figure, numbers: Numbers) -> None:
    axes, dense = figure.subplots(), numbers["dense"]
    cells = dict(sorted(numbers["cells"].items(), key=lambda cell: max(cell[1].values())))
    for index, allocation in enumerate(("Uniform", "Inverse", "Global")):
        lost = [one[allocation] / dense - 1 for one in cells.values()]
        # one below the other: equal values would hide each other
        places = [place + 0.2 * (index - 1) for place in range(len(cells))]
        axes.plot(lost, places, "osD"[index], markersize=4, color=hue(index), label=allocation)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()
    axes.set_title("perplexity above dense, a quarter of the decoder removed")
    figure.legend(loc="outside right center", title="budget divided")


PICTURE = Picture(
    80,
    "Which heads and channels go decides what is lost: eight importances with three ways to divide the budget.",
    _take,
    _draw,
    "structured_pruning.md",
)

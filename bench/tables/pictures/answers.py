"""Which answers stay, by how much faster a prompt could be read."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_KEPT = {  # by the scorer's name in the records; others by that name
    "calibrated": "calibrated",
    "calibrated before": "an earlier calibration",
    "random": "random, the earlier schedules",
    "last_window": "all heads, the earlier schedules",
    "snap_kv": "SnapKV (a smaller cache only)",
    "expected_attention": "ExpectedAttention (cache only)",
    "random_cache": "random cache (cache only)",
    "fast_kv": "FastKV",
    "gem_filter": "GemFilter",
    "llm_lingua": "LLMLingua",
}

_ASIDE = 0.04  # of a point that would lie on another


def _take(folder: Path) -> Numbers:
    """By who chooses: bounds of the speed of prefill, shares of the right answers kept in %, and their intervals."""
    points: dict[str, dict[float, list[float]]] = {}
    found = figures_of(folder, "token_answers.jsonl")
    for figure, one in sorted(found.items(), key=lambda item: str(item[1]["date"])):  # of one bound the newest
        row = one["details"]
        if figure.startswith(("needles-more-", "needles-calibrated-")) and "-unseen-" not in figure:
            name = "calibrated" if row["scorer"].startswith("calibrated-") else row["scorer"].partition("(")[0]
            if name == "calibrated" and figure.startswith("needles-more-"):
                name = "calibrated before"
            points.setdefault(name, {})[round(row["bound"], 2)] = [row["bound"], one["value"], row["low"], row["high"]]
    order = sorted(points, key=lambda name: [*_KEPT, name].index(name))
    return {name: [points[name][bound] for bound in sorted(points[name])] for name in order}


def _draw(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    axes.plot(1, 100, marker="*", markersize=10, linestyle="", color=GREY, label="unpruned")
    taken: list[list[float]] = []
    for index, (name, points) in enumerate(numbers.items()):
        _, value, low, high = ([point[field] for point in points] for field in range(4))
        bound = [_beside(taken, point) for point in points]
        error = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        colour = GREY if "random" in name else hue(index)
        axes.errorbar(bound, value, yerr=error, marker="os^DvPX"[index % 7], color=colour, label=_KEPT.get(name, name))
    axes.set_ylim(0, 104)
    axes.set_xlabel("prefill, times less arithmetic (bound)")
    axes.set_title("right answers that stay right, %")
    figure.legend(loc="outside right center")


def _beside(taken: list[list[float]], point: list[float]) -> float:
    """Where a point stands: aside, to the right and to the left by turns, where it would lie on others."""
    bound, _, low, high = point
    near = sum(abs(bound - other) < _ASIDE and low <= up and down <= high for other, _, down, up in taken)
    taken.append(point)
    return bound + _ASIDE * math.ceil(near / 2) * (1 if near % 2 else -1)


PICTURE = Picture(
    40,
    "Which of a chat model's right answers to facts planted in prompts of up to 3,000 tokens stay right, and how "
    "much faster the prompt could be read, by who chooses what stays. Bars are 95 % intervals; points that would lie "
    "on one another stand side by side.",
    _take,
    _draw,
    "token_pruning.md",
    (7.2, 3.4),
)

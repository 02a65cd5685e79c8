"""Patterns of zeros after fine-tuning."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_PATTERNS = {
    "dense": "dense",
    "wanda": "unstructured, 41.8 %",
    "half": "2:4, 50 %",
    "oneshot": "three tiers, 41.7 %, one cut",
    "progressive": "three tiers, 41.7 %, five steps",
}


def _take(folder: Path) -> Numbers:
    found = figures_of(folder, "block_sparsity.jsonl")
    return {arm: [found[f"block-ppl-{arm}"][field] for field in ("value", "spread")] for arm in _PATTERNS}


def _draw(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    values, spreads = zip(*numbers.values(), strict=True)
    for place, (arm, value, spread) in enumerate(zip(numbers, values, spreads, strict=True)):
        axes.errorbar(value, place, xerr=spread, fmt="o", color=GREY if arm == "dense" else hue(0), markersize=8)
    axes.set_yticks(range(len(numbers)), [_PATTERNS[arm] for arm in numbers])
    axes.invert_yaxis()
    axes.set_title("perplexity after equal fine-tuning, 8 M parameters")


PICTURE = Picture(
    90,
    "What each pattern of zeros costs after the same fine-tuning of a small model; lines are seeds.",
    _take,
    _draw,
    "block_sparsity.md",
    (6.4, 2.4),
)

"""Facts that a small model still answers."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_SCORERS = {"mlp": "learned", "hidden_norm": "length of hidden state", "last_window": "attention of the last tokens"}
_SCORERS |= {"random": "random", "recency": "the end of the prompt"}


def _take(folder: Path) -> Numbers:
    """Answers right by scorer and share kept, and half their 95 % intervals."""
    found = figures_of(folder, "token_quality.jsonl")
    keep = (0.7, 0.5, 0.3)
    rows = {scorer: [found[f"recall-recall-{scorer}-{share}"] for share in keep] for scorer in _SCORERS}
    return {scorer: [[one["value"], one["spread"]] for one in row] for scorer, row in rows.items()}


def _draw(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    for index, (scorer, label) in enumerate(_SCORERS.items()):
        colour = GREY if scorer in ("random", "recency") else hue(index)
        style = ":" if scorer == "recency" else "-"
        value, spread = zip(*numbers[scorer], strict=True)
        axes.errorbar(
            range(3), value, yerr=spread, marker="o", color=colour, linestyle=style, label=label, zorder=10 - index
        )  # fmt: skip
    axes.set_xticks(range(3), ["70 %", "50 %", "30 %"])
    axes.set_xlabel("of the prompt's tokens kept")
    axes.set_title("facts of the prompt answered right, %")
    figure.legend(loc="outside right center")


PICTURE = Picture(
    70,
    "Which facts of a prompt a small model still answers, by who chooses the tokens that stay. Bars are 95 % "
    "intervals.",
    _take,
    _draw,
    "token_pruning_small_models.md",
)

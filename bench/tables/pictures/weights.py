"""What pruned weights cost a pretrained model."""

from pathlib import Path

from matplotlib.axes import Axes

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_TEXTS = {"wikitext2": "WikiText-2", "novel": "a novel"}


_ARMS = {"structured-25": "a quarter removed\n(structured)", "two-four": "2:4 everywhere\n(50 % zeros)"}
_ARMS |= {"three-tiers": "three tiers\n(41.7 % zeros)", "mix": "best mix in\nas many bytes"}


def take(folder: Path) -> Numbers:
    """Perplexity over the dense model's, by way of pruning and text."""
    found = figures_of(folder, "real_model.jsonl")
    return {arm: {text: found[f"{arm}-{text}"]["value"] for text in _TEXTS} for arm in _ARMS}


def draw(axes: Axes, numbers: Numbers) -> None:
    """Draw them into a part of a picture."""
    for index, (text, label) in enumerate(_TEXTS.items()):
        places = [place + 0.38 * index - 0.19 for place in range(len(numbers))]
        bars = axes.bar(places, [one[text] for one in numbers.values()], 0.36, color=hue(index), label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(numbers)), [_ARMS[arm] for arm in numbers], fontsize=6.5)
    axes.set_title("perplexity, times the dense model's")
    axes.legend(loc="upper left", fontsize=7)


PICTURE = Picture(
    60,
    "What pruned weights cost a pretrained chat model without any training, on two texts.",
    take,
    lambda figure, numbers: draw(figure.subplots(), numbers),
    "real_model.md",
)

"""What pruned weights cost a pretrained model."""

from pathlib import Path

from matplotlib.axes import Axes

from bench.report.palette import hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_TEXTS = {"wikitext2": "WikiText-2", "novel": "a novel"}


_ARMS = {"structured-25": "a quarter of the\ndecoder removed", "mix": "best mix, bytes\nof the three tiers"}
_ARMS |= {"two-four": "2:4 everywhere,\n50 % zeros", "three-tiers": "three tiers,\n41.7 % zeros"}
_TICKS = (1, 1.5, 2, 3, 5)


def take(folder: Path) -> Numbers:
    """Perplexity over the dense model's, by way of pruning and text."""
    found = figures_of(folder, "real_model.jsonl")
    return {arm: {text: found[f"{arm}-{text}"]["value"] for text in _TEXTS} for arm in _ARMS}


def draw(axes: Axes, numbers: Numbers) -> None:
    """Draw them into a part of a picture."""
    arms = sorted(numbers, key=lambda arm: sum(numbers[arm].values()))
    for index, (text, label) in enumerate(_TEXTS.items()):
        places = [place + 0.3 * index - 0.15 for place in range(len(arms))]
        values = [numbers[arm][text] for arm in arms]
        axes.hlines(places, 1, values, color=hue(index), linewidth=1)
        axes.plot(values, places, "os"[index], color=hue(index), label=label)
        for value, place in zip(values, places, strict=True):
            axes.annotate(f"{value:.2f}", (value, place), (6, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_xscale("log")
    axes.set_xlim(1, 1.25 * max(max(one.values()) for one in numbers.values()))  # room for the numbers
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(arms)), [_ARMS[arm] for arm in arms], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("1: nothing is lost")
    axes.set_title("perplexity, times the dense model's")
    axes.legend(loc="upper right", fontsize=8)


PICTURE = Picture(
    60,
    "What pruned weights cost a pretrained chat model without any training, on two texts.",
    take,
    lambda figure, numbers: draw(figure.subplots(), numbers),
    "real_model.md",
)

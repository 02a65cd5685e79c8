"""How much faster a calibrated prompt is read; a part of the overview."""

from pathlib import Path

from matplotlib.axes import Axes

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, figures_of


def take(folder: Path) -> Numbers:
    """Speed-up of a pretrained model's calibrated prefill, and its bound, by prompt length."""
    found = figures_of(folder, "token_pruning.jsonl")
    lengths = (1024, 2048, 4096)
    arms = {length: found[f"prefill-speedup-{length}"]["details"]["arms"]["pruned"] for length in lengths}
    return {str(length): {"measured": arm["speedup"], "bound": arm["bound"]} for length, arm in arms.items()}


def draw(axes: Axes, numbers: Numbers) -> None:
    """Draw them into a part of a picture."""
    for index, (name, label) in enumerate({"bound": "bound by FLOPs", "measured": "measured"}.items()):
        places = [place + 0.38 * index - 0.19 for place in range(len(numbers))]
        heights = [one[name] for one in numbers.values()]
        axes.bar(places, heights, 0.36, color=GREY if name == "bound" else hue(0), label=label)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(numbers)), [f"{int(length):,}" for length in numbers])
    axes.set_xlabel("tokens in the prompt")
    axes.set_title("reading a prompt, times faster")
    axes.set_ylim(0, 1.3 * max(one["bound"] for one in numbers.values()))  # room for the legend
    axes.legend(loc="upper left", fontsize=7)

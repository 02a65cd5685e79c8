"""What fewer bytes are worth on slow links."""

from pathlib import Path

from matplotlib.axes import Axes

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_RATES = ("50mbit", "100mbit", "250mbit", "500mbit", "1gbit", "10gbit")


def take(folder: Path) -> Numbers:
    """Speed-up of a step over no compression by link rate, and its spread."""
    found = figures_of(folder, "links.jsonl")
    methods = ("none_a2a", "bf16_both", "int8_gradients", "int8_both")
    rows = {name: [found[f"speedup-{name}-{rate}"] for rate in _RATES] for name in methods}
    return {name: [[one["value"], one["spread"]] for one in row] for name, row in rows.items()}


def draw(axes: Axes, numbers: Numbers) -> None:
    """Draw them into a part of a picture."""
    names = {
        "int8_both": "int8 gradients and parameters",
        "bf16_both": "bf16 gradients and parameters",
        "int8_gradients": "int8 gradients",
        "none_a2a": "fp32, half of gloo's bytes",
    }
    for index, (name, label) in enumerate(names.items()):
        colour = GREY if name == "none_a2a" else hue(index)
        value, spread = zip(*numbers[name], strict=True)
        axes.errorbar(range(len(_RATES)), value, yerr=spread, marker="o", color=colour, label=label)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(
        range(len(_RATES)), [rate.replace("bit", "").replace("m", " M").replace("g", " G") for rate in _RATES]
    )
    axes.set_xlabel("link between two hosts, bit/s")
    axes.set_title("training step, times faster")
    axes.legend(loc="upper right", fontsize=7)


PICTURE = Picture(
    20,
    "How much faster a training step becomes when fewer bytes cross a slow link; a fast one gains nothing. Bars are "
    "the scatter of a run's steps.",
    take,
    lambda figure, numbers: draw(figure.subplots(), numbers),
    "bench.md",
    (6.4, 3.4),
)

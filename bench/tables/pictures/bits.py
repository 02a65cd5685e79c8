"""What a pretrained model's perplexity costs in bits of a pruned weight, by pattern."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_TEXTS = {"wikitext2": "WikiText-2", "novel": "a novel"}
_KINDS = {  # by how the names of arms begin
    "mix": "the best mix of tiers found",
    "tiers": "three tiers by the schedule",
    "2:4": "2:4",
    "4:8": "4:8",
    "unstructured": "unstructured",
}
_TICKS = (1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 1000)
_METHODS = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "ria": "RIA", "magnitude": "size of weights"}


def _take(folder: Path) -> Numbers:
    """By arm in words: bits of a weight, and by text the perplexity over dense and its spread."""
    arms: Numbers = {}
    for one in figures_of(folder, "block_peers.jsonl").values():
        row = one["details"]
        kind = next((kind for kind in _KINDS if str(row.get("arm", "")).startswith(kind)), None)
        if kind is None or row.get("bits") is None or row["tuned_tokens"] or row["text"] not in _TEXTS:
            continue
        method = _METHODS.get(str(row["arm"]).rpartition("-")[2], "SparseGPT")  # mixes
        arm = arms.setdefault(str(row["arm"]), {"label": f"{_KINDS[kind]}, {method}", "bits": row["bits"], "texts": {}})
        arm["texts"][row["text"]] = [one["value"], one["spread"] or 0.0]
    return dict(sorted(arms.items(), key=lambda arm: min(value for value, _ in arm[1]["texts"].values())))


def _draw(figure: Figure, numbers: Numbers) -> None:
    axes, arms = figure.subplots(), list(numbers.values())
    for index, (text, label) in enumerate(_TEXTS.items()):
        places = [place + 0.24 * index - 0.12 for place in range(len(arms))]
        values, spreads = zip(*(arm["texts"][text] for arm in arms), strict=True)
        style: dict[str, Any] = {
            "marker": "os"[index],
            "markersize": 4,
            "linestyle": "",
            "capsize": 2,
            "color": hue(index),
        }
        axes.errorbar(values, places, xerr=spreads, label=label, zorder=3, **style)
        for value, place in zip(values, places, strict=True):
            axes.annotate(f"{value:.2f}", (value, place), (8, -2.5), textcoords="offset points", fontsize=7)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    most = max(value for arm in arms for value, _ in arm["texts"].values())
    ticks = [tick for tick in _TICKS if tick <= 1.3 * most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.95, 1.25 * most)
    axes.set_yticks(range(len(arms)), [f"{arm['label']}: {arm['bits']:.2f} bits" for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title("perplexity, times the dense model's")
    figure.legend(loc="outside lower center", ncols=2)


PICTURE = Picture(
    85,
    "What a pruned weight takes in a file, of 16 bits, and what that costs a pretrained chat model in perplexity, "
    "nothing trained: patterns, and the methods that choose within them. Bars are seeds.",
    _take,
    _draw,
    "block_sparsity.md",
    (8.4, 3.4),
)

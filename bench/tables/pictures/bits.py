"""What a pretrained model's perplexity costs in bits of a pruned weight, by pattern."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_TEXTS = {"wikitext2": "WikiText-2", "novel": "a novel"}
_KINDS = {  # by how the names of arms begin, and how they are drawn
    "mix": ("the best mix of tiers found", "*"),
    "tiers": ("three tiers by the schedule", "s"),
    "2:4": ("2:4", "o"),
    "4:8": ("4:8", "D"),
    "unstructured": ("unstructured", "^"),
}
_TICKS = (1, 2, 3, 4, 5, 7, 10, 20, 50, 100, 1000)
_METHODS = {"sparsegpt": hue(0), "wanda": hue(1), "ria": hue(2), "magnitude": hue(3)}


def _take(folder: Path) -> Numbers:
    """By text: of every arm its kind, method, bits, perplexity over dense and spread."""
    points: dict[str, list[list[object]]] = {text: [] for text in _TEXTS}
    for one in figures_of(folder, "block_peers.jsonl").values():
        row = one["details"]
        kind = next((kind for kind in _KINDS if str(row.get("arm", "")).startswith(kind)), None)
        if kind is None or row.get("bits") is None or row["tuned_tokens"] or row["text"] not in points:
            continue
        method = str(row["arm"]).rpartition("-")[2]
        method = method if method in _METHODS else "sparsegpt"  # mixes
        points[row["text"]].append([kind, method, row["bits"], one["value"], one["spread"] or 0.0])
    return dict(points)


def _draw(figure: Figure, numbers: Numbers) -> None:
    for axes, (text, points) in zip(figure.subplots(1, 2, sharey=True), numbers.items(), strict=True):
        for kind, method, bits, value, spread in points:
            marker = _KINDS[kind][1]
            size = 11 if marker == "*" else 6
            axes.errorbar(bits, value, yerr=spread, marker=marker, markersize=size, color=_METHODS[method])
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        most = max((point[3] for point in points), default=1.0)
        ticks = [tick for tick in _TICKS if tick <= 1.2 * most]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("bits a pruned weight takes, of 16")
        axes.set_title(f"perplexity, times the dense model's: {_TEXTS[text]}")
    kinds = {kind for points in numbers.values() for kind, *_ in points}
    methods = {method for points in numbers.values() for _, method, *_ in points}
    shapes = [axes.plot([], [], _KINDS[k][1], color=GREY, label=_KINDS[k][0])[0] for k in _KINDS if k in kinds]
    colours = [axes.plot([], [], "o", color=c, label=m)[0] for m, c in _METHODS.items() if m in methods]
    figure.legend(handles=[*shapes, *colours], loc="outside right center")


PICTURE = Picture(
    85,
    "What a pruned weight takes in a file, and what that costs a pretrained chat model in perplexity, nothing trained: "
    "patterns, and the methods that choose within them. Bars are seeds.",
    _take,
    _draw,
    "block_sparsity.md",
    (9.6, 3.2),
)

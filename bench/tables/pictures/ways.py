"""What a quarter of a pretrained model's decoder is worth, by way to remove it: cut, refitted, recovered."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_TEXTS = {"wikitext2": "WikiText-2", "novel": "a novel"}
_WAYS = {
    "pare": "Pare's default",
    "flap": "FLAP",
    "llm-pruner": "LLM-Pruner",
    "shortgpt": "ShortGPT",
    "shortened-llama": "Shortened LLaMA",
    "magnitude": "size of weights",
    "random": "chance",
}
_STAGES = {  # what is drawn, and the figures' names; a way is a published one's as published
    "cut": ("cut, nothing else", "o", GREY, "{way}-25-{text}-before"),
    "refitted": ("and refitted", "s", hue(0), "{way}-refitted-25-{text}-before"),
    "recovered": ("recovered by a few steps, over the dense model alike", "^", hue(1), "{way}-25-{text}-after"),
}
_OFFSETS = {"cut": -0.18, "refitted": 0.0, "recovered": 0.18}  # of a way's row: they may lie on one another
_TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50)
_OWN = {"cut": "pare-unrefitted-25-{text}-before", "refitted": "pare-25-{text}-before"}  # refitting is the default


def _take(folder: Path) -> Numbers:
    """By way and text: perplexity over the dense model's at every stage that was measured, and its spread."""
    found = figures_of(folder, "structured_peers.jsonl")
    rows: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for way, text in ((way, text) for way in _WAYS for text in _TEXTS):
        for stage, (*_, name) in _STAGES.items():
            name = _OWN.get(stage, name) if way == "pare" else name
            if one := found.get(name.format(way=way, text=text)):
                rows.setdefault(way, {}).setdefault(text, {})[stage] = [one["value"], one["spread"]]
    return dict(rows)


def _draw(figure: Figure, numbers: Numbers) -> None:
    for axes, text in zip(figure.subplots(1, 2, sharey=True), _TEXTS, strict=True):
        for stage, (label, marker, colour, _) in _STAGES.items():
            for row, way in enumerate(numbers):
                value, spread = numbers[way].get(text, {}).get(stage, (None, None))
                place = row + _OFFSETS[stage]
                if value is not None:
                    axes.errorbar(value, place, xerr=spread, marker=marker, color=colour, markersize=6)
            axes.plot([], [], marker, color=colour, label=label if text == "novel" else None)
        axes.set_xscale("log")
        axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.minorticks_off()
        axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_title(f"perplexity, times the dense model's: {_TEXTS[text]}")
        axes.set_yticks(range(len(numbers)), [_WAYS[way] for way in numbers])
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)


PICTURE = Picture(
    55,
    "A quarter of a pretrained chat model's decoder removed by Pare's default and by published ways: cut, refitted, "
    "and recovered briefly beside the dense model tuned alike.",
    _take,
    _draw,
    "structured_pruning.md",
    (9.2, 3.2),
)

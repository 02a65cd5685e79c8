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
_SIZES = {"cut": 7, "refitted": 7, "recovered": 4.5}  # they may lie on one another
_TICKS = (1, 1.5, 2, 3, 4, 5, 6)
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
    return dict(sorted(rows.items(), key=lambda row: sum(stages["cut"][0] or 0.0 for stages in row[1].values())))


def _draw(figure: Figure, numbers: Numbers) -> None:
    for axes, text in zip(figure.subplots(1, 2, sharey=True), _TEXTS, strict=True):
        for row, stages in enumerate(one.get(text, {}) for one in numbers.values()):
            values = [value for value, _ in stages.values()]
            axes.plot(values, [row] * len(values), color=GREY, linewidth=0.8)
            for stage, (value, spread) in stages.items():
                _, marker, colour, _ = _STAGES[stage]
                if value > _TICKS[-1]:
                    axes.plot(_TICKS[-1], row, ">", color=colour, markersize=_SIZES[stage], clip_on=False)
                else:
                    axes.errorbar(value, row, xerr=spread, marker=marker, color=colour, markersize=_SIZES[stage])
            if beyond := [f"{value:.2g}" for value in values if value > _TICKS[-1]]:
                axes.annotate(", ".join(beyond), (_TICKS[-1], row), (-7, 0), textcoords="offset points", ha="right",
                              va="center", fontsize=8)  # fmt: skip
        for label, marker, colour, _ in _STAGES.values():
            axes.plot([], [], marker, color=colour, label=label if text == "novel" else None)
        axes.set_xscale("log")
        axes.set_xlim(1, _TICKS[-1])
        axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.minorticks_off()
        axes.set_title(f"perplexity, times the dense model's: {_TEXTS[text]}")
        axes.set_yticks(range(len(numbers)), [_WAYS[way] for way in numbers])
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)


PICTURE = Picture(
    55,
    "A quarter of a pretrained chat model's decoder removed by Pare's default and by published ways: cut, refitted "
    "as the default is, and recovered briefly beside the dense model tuned alike (the default from its refit, the "
    "others from the cut).",
    _take,
    _draw,
    "structured_pruning.md",
    (9.2, 3.2),
)

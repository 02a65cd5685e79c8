"""Which layers look up what is asked for."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.report.palette import GREY, hue
from bench.tables.pictures.picture import Numbers, Picture, figures_of

_TICKS = (2, 5, 10, 20, 50, 100)


def _take(folder: Path) -> Numbers:
    """Share of the context that a planted answer needs, in %, by layer: with its best heads, and with all."""
    rows = figures_of(folder, "real_model.jsonl")["needed"]["details"]["needed"]
    return {"layers": [row["layer"] for row in rows]} | {
        field: [100 * row[field] for row in rows] for field in ("share", "all_heads")
    }


def _draw(figure: Figure, numbers: Numbers) -> None:
    axes = figure.subplots()
    for field, label, colour in (("all_heads", "all heads", GREY), ("share", "its best heads", hue(0))):
        look = {"markersize": 7, "markerfacecolor": "none"} if field == "all_heads" else {"markersize": 4}
        axes.plot(numbers["layers"], numbers[field], marker="o", color=colour, label=label, **look)
    axes.set_yscale("log")
    axes.set_yticks(_TICKS, [str(tick) for tick in _TICKS])
    axes.minorticks_off()
    axes.set_xlabel("layer whose attention chooses")
    axes.set_title("% of the prompt that must stay for the answer to stay")
    axes.legend()


PICTURE = Picture(
    50,
    "Few layers look up what is asked for: by their attention a few percent of the prompt hold 95 % of the "
    "answers, by that of others nearly all of it must stay. A pretrained chat model, planted facts.",
    _take,
    _draw,
    "real_model.md",
)

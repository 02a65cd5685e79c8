"""The picture of the first page."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.tables.pictures import links, prefill, weights
from bench.tables.pictures.picture import Numbers, Picture


def _take(folder: Path) -> Numbers:
    return {"links": links.take(folder), "prefill": prefill.take(folder), "real": weights.take(folder)}


def _draw(figure: Figure, numbers: Numbers) -> None:
    parts = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.0))
    for axes, (name, part) in zip(parts, {"links": links, "prefill": prefill, "real": weights}.items(), strict=True):
        part.draw(axes, numbers[name])


PICTURE = Picture(
    10,
    "Left: a training step that sends fewer bytes, by the speed of the link. Middle: reading a prompt of a pretrained "
    "chat model, calibrated. Right: what pruning costs that model without any training.",
    _take,
    _draw,
    "README.md",
    (10.0, 3.4),
)

"""What a picture of the documents is, and what all of them share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bench.tables import figures
from common.records import record

Numbers = dict[str, Any]
"""What is drawn, as JSON."""


class Picture(NamedTuple):
    """One picture.

    Attributes:
        place: In the gallery, ascending.
        shows: What is to be seen.
        take: Takes the numbers from the folder of records.
        draw: Draws them.
        page: The page of results that it belongs to.
        size: In inches.
    """

    place: int
    shows: str
    take: Callable[[Path], Numbers]
    draw: Callable[[Figure, Numbers], None]
    page: str
    size: tuple[float, float] = (6.4, 3.0)


def figures_of(folder: Path, file: str) -> dict[str, Mapping[str, Any]]:
    """The newest record of every figure of a file, by the figure's name."""
    return figures.newest(record.read(folder / file)[0])

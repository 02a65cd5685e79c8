"""Pictures of the documents, drawn from records into docs/pictures: one file, one picture.

A module with a ``PICTURE`` is all it takes to add one. A picture carries a digest of the numbers it was drawn from, so
that it is known to be old when the records have others.
"""

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench.report.drawing import STYLE
from bench.tables.pictures.picture import Numbers, Picture

FOLDER, _DPI = "docs/pictures", 120


def _every() -> dict[str, Picture]:
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    found = {name: module.PICTURE for name, module in modules.items() if hasattr(module, "PICTURE")}
    return dict(sorted(found.items(), key=lambda item: item[1].place))


PICTURES = _every()


def gallery() -> str:
    """All pictures in Markdown, for a page in `docs/`."""
    parts = [
        f"### {name.replace('_', ' ').capitalize()}\n\n![{picture.shows}](pictures/{name}.png)\n\n{picture.shows} "
        f"[Numbers](results/{picture.page})"
        for name, picture in PICTURES.items()
    ]
    return "\n\n".join(parts)


def _digest(numbers: Numbers) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def drifted(root: Path, records: Path) -> Iterator[tuple[Path, Picture, Numbers]]:
    """The pictures that were not drawn from the numbers that the records have now, and those numbers."""
    for name, picture in PICTURES.items():
        path, numbers = root / FOLDER / f"{name}.png", picture.take(records)
        if _drawn_from(path) != _digest(numbers):
            yield path, picture, numbers


def _drawn_from(path: Path) -> str | None:
    """The digest that a picture carries; None without a picture."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Numbers")


def write(path: Path, picture: Picture, numbers: Numbers) -> None:
    """Draw a picture into a PNG file that carries the digest of its numbers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=picture.size, layout="constrained", dpi=_DPI)
        picture.draw(figure, numbers)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": None, "Numbers": _digest(numbers)}
        FigureCanvasAgg(figure).print_png(path, metadata=metadata, pil_kwargs={"optimize": True})

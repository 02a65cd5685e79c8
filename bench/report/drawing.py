"""Charts as SVG text for the page and as files, always in the same style; nothing here reads records."""

import io
import math
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from bench.report.content import Chart
from bench.report.palette import DARK, GRID, TEXT

STYLE: Any = {  # matplotlib names each key in its type
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "pare",  # equal input, equal bytes
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=[TEXT]),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2.5,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
}
MAX_PANELS = 4
TITLE_WIDTH = 92  # characters of a heading across a whole chart
MAX_RUNS = 8  # with charts of their own, in each section


def render(chart: Chart) -> Figure:
    """Draw a chart on a figure of its own."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=chart.size, layout="constrained")
        chart.draw(figure)
        for axes in figure.axes:
            _settle_title(axes)
    return figure


def _settle_title(axes: Axes) -> None:
    """Keep a title in its place; else matplotlib measures all labels of the axis, several times, to look for a common
    factor above it that the title must evade. Only its own formatter of plain scales writes one.
    """
    if axes.get_title() and not isinstance(axes.yaxis.get_major_formatter(), ScalarFormatter):
        axes.set_title(axes.get_title(), y=1.0)


def svg(chart: Chart) -> str:
    """An <svg> element to stand in a page: colours follow the page's theme, identifiers are unique to the chart."""
    figure, out = render(chart), io.StringIO()
    figure.patch.set_visible(False)
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{chart.name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{chart.name}-", text)
    text = re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{m[0][1:]})" if m[0] in DARK else m[0], text)
    # a hundredth of a point is invisible, and half the size; in tags only, for between them stand labels
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)
    return re.sub(r"\n\s*", "\n", text).replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def write(chart: Chart, png: pathlib.Path, vector: pathlib.Path) -> None:
    """Write a chart as PNG (200 dpi) and as a self-standing SVG, both on white."""
    figure = render(chart)
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None}, pil_kwargs={"optimize": True})
        FigureCanvasSVG(figure).print_svg(vector, metadata={"Date": None})


def grid(figure: Figure, panels: int, columns: int = 2, **options: Any) -> list[Axes]:
    """Axes for so many panels, row by row; columns shrink to the number of panels."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for spare in axes[panels:]:
        spare.remove()
    return axes[:panels]


def panel_size(titles: Sequence[str], columns: int = 2, height: float = 3.0) -> tuple[float, float]:
    """Size of a chart with a `grid` of panels under these headings."""
    columns = min(columns, len(titles))
    each = height + 0.16 * title_lines(titles, columns)
    return 8.0, each * math.ceil(len(titles) / columns) + 0.3


def bars(
    axes: Axes,
    places: Sequence[float],
    lengths: Sequence[float],
    colour: str,
    starts: Sequence[float] | None = None,
    width: float = 0.8,
    lying: bool = False,
    **look: Any,
) -> None:
    """Draw bars of one look as one path; ``Axes.bar`` makes an artist of every one, of which a chart has hundreds.

    Args:
        axes: Where.
        places: Middle of each bar across it.
        lengths: Their lengths; infinite ones are left out.
        colour: Of all.
        starts: Where they begin; 0 by default.
        width: Of each.
        lying: Bars lie; their places count upwards.
        **look: Of ``PathPatch``: label, transparency, …
    """
    base = np.zeros(len(places)) if starts is None else np.asarray(starts, float)
    known = np.isfinite(ends := base + lengths)
    base, ends, middle = base[known], ends[known], np.asarray(places, float)[known]
    sides = [middle - width / 2, middle - width / 2, middle + width / 2, middle + width / 2, middle - width / 2]
    corners = np.stack([np.stack(sides), np.stack([base, ends, ends, base, base])], axis=-1)
    vertices = corners.swapaxes(0, 1).reshape(-1, 2)[:, :: -1 if lying else 1]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(base)
    patch = axes.add_artist(PathPatch(Path(vertices, codes), facecolor=colour, linewidth=0, **look))
    (patch.sticky_edges.x if lying else patch.sticky_edges.y).extend(base)  # no margin where bars begin
    axes.update_datalim(vertices)
    axes.autoscale_view()


def plain_numbers(axis: Axis) -> None:
    """Ticks with grouped digits."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def log_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic scale with plain numbers, when the values are positive and span more than a factor of five."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) / min(finite) < 5:
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    plain_numbers(axis)
    if max(finite) / min(finite) > 20:
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if f"{value:e}"[0] in "25" else ""))


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend below all panels, each label once."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)


def label(text: str, width: int = 34) -> str:
    """A label that fits beside an axis, on as many lines as it takes; matplotlib does not take it for mathematics."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False) or [text]
    return "\n".join(lines).replace("$", r"\$")


def heading(axes: Axes, text: str, columns: int = 2) -> None:
    """Title of one of several panels beside each other, on as many lines as the panel's width takes."""
    axes.set_title(label(text, TITLE_WIDTH // columns))


def title_lines(titles: Sequence[str], columns: int = 2) -> int:
    """Lines of the longest of those headings."""
    return max((label(title, TITLE_WIDTH // columns).count("\n") + 1 for title in titles), default=1)


def spread_out(lengths: Sequence[int], titles: Sequence[str]) -> list[float]:
    """Heights in inches of panels below each other with so many bars each, and a title."""
    lines = [title_lines([title], 1) for title in titles]
    return [0.4 + 0.15 * line + 0.26 * length for length, line in zip(lengths, lines, strict=True)]


def legend_height(labels: int, columns: int = 4) -> float:
    """Inches that a legend of so many entries takes."""
    return 0.18 * math.ceil(labels / columns)


def left_out(settings: int) -> str:
    """What a chart says when it draws only the first of the settings found; "" when it draws all."""
    if settings <= MAX_PANELS:
        return ""
    return f"Drawn: {MAX_PANELS} of {settings} settings, the largest comparisons; the table below has all."


def last_runs(found: int) -> str:
    """What a section says when it draws only the last runs of those found; "" when it draws all."""
    if found <= MAX_RUNS:
        return ""
    return f"Drawn: the last {MAX_RUNS} of {found:,} runs. To see others, report a file that holds them alone."

"""What a report consists of, before it is drawn or written: sections of figures, tables, pictures and prose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from common.tables import Table


@dataclass(frozen=True)
class Chart:
    """One drawing with the numbers behind it.

    Attributes:
        name: File name without ending, also the anchor in the page.
        title: What is shown, as a sentence-case heading.
        summary: What a reader who cannot see the drawing needs to know: axes, what is compared, the extremes.
        draw: Draws on an empty matplotlib figure.
        data: Every number in the drawing, and those of groups left out of it.
        size: Width and height in inches.
        note: What the drawing leaves out or cannot show.
    """

    name: str
    title: str
    summary: str
    draw: Callable[[Canvas], None]
    data: Table
    size: tuple[float, float] = (8.0, 4.0)
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table for reading and for export.

    Attributes:
        name: File name without ending, also the anchor in the page.
        title: Caption.
        table: The numbers.
        note: Text below.
    """

    name: str
    title: str
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Markings:
    """Ready HTML: small pictures, coloured text, collapsible details. Built from escaped parts only."""

    html: Markup


Block = Chart | Sheet | Markings


@dataclass(frozen=True)
class Section:
    """A part of the report with an entry in its table of contents.

    Attributes:
        name: Anchor.
        title: Heading.
        lead: What to look for and what the section cannot show.
        blocks: What is in it, in order.
    """

    name: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=list)

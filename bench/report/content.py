"""What a report consists of, before it is drawn or written: sections of figures, tables, pictures and prose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from bench.report.values import Record
from common.tables import Table

LONG = 12  # rows of a table that nobody reads without being told what they say
FOLDED = 30  # rows beyond which a table is folded


@dataclass(frozen=True)
class Chart:
    """One drawing with the numbers behind it.

    Attributes:
        name: File name without ending, also the anchor in the page.
        title: What is shown, as a sentence-case heading.
        summary: What a reader who cannot see the drawing needs to know: axes, and what is compared.
        verdict: What there is to see in it, in a sentence; stands above it.
        draw: Draws on an empty matplotlib figure.
        data: Every number in the drawing, and those of groups left out of it.
        size: Width and height in inches.
        note: What the drawing leaves out or cannot show.
        records: What the numbers come from.
    """

    name: str
    title: str
    summary: str
    verdict: str
    draw: Callable[[Canvas], None]
    data: Table
    size: tuple[float, float] = (8.0, 4.0)
    note: str = ""
    records: Sequence[Record] = ()


@dataclass(frozen=True)
class Sheet:
    """A table for reading and for export.

    Attributes:
        name: File name without ending, also the anchor in the page.
        title: Caption.
        table: The numbers.
        note: Text below.
        verdict: What the numbers say, in a sentence; no table of more than `LONG` rows goes without.
        units: Header of the column with the unit of each row, where rows have different ones.
        records: What the numbers come from.
        anchors: Rows are linked to as this and the text of their first cell; "" where nothing links to them.
    """

    name: str
    title: str
    table: Table
    note: str = ""
    verdict: str = ""
    units: str | None = None
    records: Sequence[Record] = ()
    anchors: str = ""

    def __post_init__(self) -> None:
        if len(self.table.rows) > LONG and not self.verdict:
            raise ValueError(f"{self.name}: a table of {len(self.table.rows)} rows needs a verdict above it")


@dataclass(frozen=True)
class Markings:
    """Ready HTML: small pictures, coloured text, collapsible details. Escaped parts only; headings are <h4>."""

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
        part: The part of the report that it stands in, such as a feature; "" for those that stand by themselves.
    """

    name: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=list)
    part: str = ""

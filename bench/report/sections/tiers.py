"""Block sparsity: what each iteration cost, which block is in which tier, and how scores differ between tiers."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Markings, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.values import Record
from common.tables import Table

_LEAD = (
    "Weight blocks are dense, 2:4 or top-k. Blocks only ever move down; a violation is a weight that came back. "
    "Sparsity is that of the pruned matrices unless the record says otherwise."
)
_NAMES = ("dense", "2:4", "top-k")
_MAP_BYTES = 1_000_000  # for pictures of blocks, all runs together
_FIELDS = ("iteration", "dense", "mid_2_4", "topk", "sparsity", "ppl", "violations")
_HEADERS = ("iteration", "dense (share)", "2:4 (share)", "top-k (share)", "sparsity (share)", "PPL", "violations")


@dataclass(frozen=True)
class TierMap:
    """Tier (0 dense, 1 two-of-four, 2 top-k) of each block, row by row."""

    name: str
    rows: int
    columns: int
    digits: bytes


@dataclass(frozen=True)
class Tiers:
    """The record's block `tiers`; values of `iterations` in the order of `_FIELDS`, None where not recorded.

    `counts` has the blocks in each tier of every matrix; `maps` only what older records say of where they are.
    """

    iterations: list[list[float | None]]
    counts: list[tuple[str, tuple[int, int, int]]]
    maps: list[TierMap]
    quantiles: dict[str, list[float]]


def parse(block: Any) -> Tiers:
    """The record's block `tiers`.

    Raises:
        ValueError: A map does not have one digit 0, 1 or 2 per block, the tiers of a matrix do not add up to its
            blocks, or a tier has not five quantiles.
    """
    iterations = [[entry.get(name) for name in _FIELDS] for entry in block.get("iterations") or []]
    matrices = block.get("matrices") or []
    maps = [_map(entry) for entry in matrices if "map" in entry]
    quantiles = {str(tier): [float(q) for q in values] for tier, values in (block.get("quantiles") or {}).items()}
    quantiles = {tier: values for tier, values in quantiles.items() if values}  # a tier without blocks has none
    if any(len(values) != 5 for values in quantiles.values()):
        raise ValueError("quantiles must be minimum, quartiles and maximum of each tier")
    return Tiers(iterations, [_counts(entry) for entry in matrices], maps, quantiles)


def _counts(entry: Any) -> tuple[str, tuple[int, int, int]]:
    rows, columns = int(entry["rows"]), int(entry["columns"])
    if "map" in entry:
        dense, mid, topk = (entry["map"].count(str(tier)) for tier in range(3))
    else:
        dense, mid, topk = (int(entry[tier]) for tier in ("dense", "mid_2_4", "topk"))
    if dense + mid + topk != rows * columns:
        raise ValueError(f"{entry['name']} must have {rows} × {columns} blocks, not {dense} + {mid} + {topk}")
    return str(entry["name"]), (dense, mid, topk)


def _map(entry: Any) -> TierMap:
    rows, columns, digits = int(entry["rows"]), int(entry["columns"]), entry["map"].encode()
    if rows * columns != len(digits) or digits.strip(b"012"):
        raise ValueError(f"map of {entry['name']} must be {rows} × {columns} digits 0, 1 or 2")
    return TierMap(str(entry["name"]), rows, columns, digits)


def section(evidence: Evidence) -> Section | None:
    """Charts per run and a picture per matrix; None when no run has tiers."""
    found = evidence.blocks("tiers", parse)
    if not found:
        return None
    drawn = found[-drawing.MAX_RUNS :]
    runs, ends = evidence.having("tiers"), _ends(found)
    zeros = [row[list(_FIELDS).index("sparsity") + 1] for row in ends.rows]
    known = [value for value in zeros if value is not None]
    said = f"{min(known):.1%} to {max(known):.1%} of the weights are zero." if known else "No run ended an iteration."
    note = drawing.last_runs(len(found))
    blocks: list[Block] = [Sheet("tiers", "After the last iteration", ends, note, said, records=runs)]
    for index, (name, tiers) in enumerate(drawn):
        if tiers.iterations:
            blocks.append(_iterations(index, name, tiers.iterations, runs))
        if tiers.quantiles:
            blocks.append(_quantiles(index, name, tiers.quantiles, runs))
        if tiers.counts:
            blocks.append(_matrices(index, name, tiers.counts, runs))
        if tiers.maps:
            blocks.append(Markings(_pictures(name, tiers.maps, _MAP_BYTES // len(drawn))))
    return Section("tiers", "Block sparsity", _LEAD, blocks)


def _ends(found: Sequence[tuple[str, Tiers]]) -> Table:
    ends = [(name, tiers.iterations[-1] if tiers.iterations else [None] * len(_FIELDS)) for name, tiers in found]
    return Table(["run", *_HEADERS], [[name, *row] for name, row in ends])


def _known(rows: Sequence[Sequence[float | None]], column: str) -> list[tuple[float, float]]:
    place = _FIELDS.index(column)
    pairs = [(row[0], row[place]) for row in rows]
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]


def _iterations(index: int, name: str, rows: list[list[float | None]], records: Sequence[Record]) -> Chart:
    sparsity, ppl = _known(rows, "sparsity"), _known(rows, "ppl")

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot([x for x, _ in sparsity], [100 * y for _, y in sparsity], marker="o", color=palette.hue(0))
        left.set_ylabel("sparsity (%)")
        left.set_ylim(bottom=0)
        right.plot([x for x, _ in ppl], [y for _, y in ppl], marker="o", color=palette.hue(1))
        right.set_ylabel("validation PPL")
        for axes in (left, right):
            axes.set_xlabel("iteration")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    last = f"Last: {sparsity[-1][1]:.1%} sparsity" if sparsity else "Sparsity not recorded"
    last += f", PPL {ppl[-1][1]:.4g}." if ppl else ", PPL not recorded."
    return Chart(
        f"tiers-{index}", f"Sparsity and perplexity by iteration: {name}",
        f"Two line charts over {len(rows)} iterations: sparsity in percent, and perplexity.", last,
        draw, Table(_HEADERS, rows), (8.0, 2.9), records=records,
    )  # fmt: skip


def _quantiles(index: int, name: str, quantiles: dict[str, list[float]], records: Sequence[Record]) -> Chart:
    tiers, values = list(quantiles), list(quantiles.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        boxes = [dict(zip(("whislo", "q1", "med", "q3", "whishi"), v, strict=True), fliers=[]) for v in values]
        drawn = axes.bxp(
            boxes, positions=range(len(tiers)), orientation="horizontal", patch_artist=True, showfliers=False
        )
        for box in drawn["boxes"]:
            box.set(facecolor=palette.GRID, edgecolor=palette.TEXT)
        for line in (*drawn["medians"], *drawn["whiskers"], *drawn["caps"]):
            line.set(color=palette.TEXT)
        axes.set_yticks(range(len(tiers)), [drawing.label(tier) for tier in tiers])
        axes.invert_yaxis()
        axes.set_xlabel("block score (unit of the score)")
        drawing.log_axis(axes, "x", [q for v in values for q in v])

    return Chart(
        f"tier-scores-{index}", f"Block scores by tier: {name}",
        "Box plot of block scores, one box per tier: minimum, quartiles, maximum.",
        "Medians: " + ", ".join(f"{tier} {v[2]:.3g}" for tier, v in quantiles.items()) + ".",
        draw, Table(["tier", "minimum", "25 %", "median", "75 %", "maximum"], [[t, *v] for t, v in quantiles.items()]),
        (8.0, 1.0 + 0.45 * len(tiers)), records=records,
    )  # fmt: skip


def _matrices(
    index: int, name: str, counts: Sequence[tuple[str, tuple[int, int, int]]], records: Sequence[Record]
) -> Chart:
    shares = [[count / sum(row) for count in row] for _, row in counts]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places, below = range(len(shares)), [0.0] * len(shares)
        for tier, (label, colour) in enumerate(zip(_NAMES, palette.TIERS, strict=True)):
            heights = [100 * row[tier] for row in shares]
            drawing.bars(axes, places, heights, colour, below, 1.0, label=label)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axes.set_xlim(-0.5, len(shares) - 0.5)
        axes.set_ylim(0, 100)
        axes.set_xlabel("matrix, in the model's order")
        axes.set_ylabel("blocks (%)")
        drawing.legend(figure, [axes])

    least = min(zip(shares, counts, strict=True), key=lambda one: one[0][0])
    return Chart(
        f"tier-matrices-{index}", f"Tiers of each matrix: {name}",
        f"Stacked bars, one for each of {len(counts)} matrices: share of its blocks in each tier.",
        f"Fewest dense blocks: {least[1][0]}, {least[0][0]:.0%}.",
        draw, Table(["matrix", *_NAMES], [[matrix, *row] for matrix, row in counts]), (8.0, 2.9), records=records,
    )  # fmt: skip


def _png(tiers: TierMap) -> str:
    """The map as a data address, a pixel a block."""
    image = Image.frombytes("P", (tiers.columns, tiers.rows), bytes(digit - ord("0") for digit in tiers.digits))
    image.putpalette([int(colour[i : i + 2], 16) for colour in palette.TIERS for i in (1, 3, 5)])
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, bits=2)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _pictures(name: str, maps: Sequence[TierMap], limit: int) -> Markup:
    """All maps of a run, or as many as fit into `limit` bytes."""
    legend = Markup(" ").join(
        Markup('<span class="swatch" style="--swatch:{}"></span>{}').format(colour, tier)
        for colour, tier in zip(palette.TIERS, _NAMES, strict=True)
    )
    pictures: list[Markup] = []
    for one in maps:
        if limit <= 0:
            break
        pictures.append(_picture(one))
        limit -= len(pictures[-1])
    cut = len(maps) - len(pictures)
    rest = Markup("<p>{} further matrices are not drawn.</p>").format(cut) if cut > 0 else ""
    template = Markup('<h4>Tier of each block: {}</h4><p class="legend">{}</p><div class="maps">{}</div>{}')
    return template.format(name, legend, Markup("").join(pictures), rest)


def _picture(one: TierMap) -> Markup:
    shares = [one.digits.count(str(tier).encode()) / max(len(one.digits), 1) for tier in range(3)]
    said = ", ".join(f"{share:.0%} {tier}" for share, tier in zip(shares, _NAMES, strict=True))
    template = Markup(
        '<figure><img src="{}" width="{}" height="{}" alt="Tier map of {}: {}">'
        "<figcaption>{}<br>{}</figcaption></figure>"
    )
    return template.format(_png(one), one.columns, one.rows, one.name, said, one.name, said)

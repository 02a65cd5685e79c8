"""Time and bandwidth of the collectives themselves, over message size."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.link import link_label
from bench.report.values import Record, number, text
from common.tables import Table

_LEAD = (
    "What the network does without any training: median over repeats of the slowest rank. Bandwidth is the bytes that "
    "an ideal algorithm sends per rank over that time, so a collective that sends more than it must looks slower."
)


@dataclass(frozen=True)
class Point:
    """One operation at one message size."""

    operation: str
    message_bytes: float
    sent_bytes: float | None
    time_ms: float
    time_ms_p90: float | None
    bandwidth: float | None


def parse(record: Record) -> list[Point]:
    """The points of a record of kind "collectives", by rising size.

    Raises:
        ValueError: A point has no size or no time.
    """
    points = []
    for entry in record["points"]:
        size, time = number(entry, "message_bytes"), number(entry, "time_ms")
        if size is None or time is None:
            raise ValueError("a point without message_bytes or time_ms")
        rest = number(entry, "sent_bytes"), time, number(entry, "time_ms_p90"), number(entry, "bandwidth")
        points.append(Point(str(entry["operation"]), size, *rest))
    return sorted(points, key=lambda p: p.message_bytes)


def section(evidence: Evidence) -> Section | None:
    """A chart per record, and the copy bandwidth between GPUs; None without such records."""
    blocks: list[Block] = []
    for index, record in enumerate(evidence.collectives[-drawing.MAX_RUNS :]):
        title = f"{text(record.get('backend'))}, {text(record.get('world_size'))} ranks, link {link_label(record)}"
        try:
            points = parse(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            evidence.problems.append(f"collectives of {title}: not understood ({type(error).__name__}: {error})")
            continue
        if points:
            blocks.append(_chart(index, title, points, record))
        if record.get("peer_bandwidth"):
            blocks.append(_peers(index, title, record["peer_bandwidth"]))
    lead = f"{_LEAD} {drawing.last_runs(len(evidence.collectives))}".strip()
    return Section("collectives", "Collectives", lead, blocks) if blocks else None


def _chart(index: int, title: str, points: list[Point], record: Record) -> Chart:
    operations = list(dict.fromkeys(p.operation for p in points))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for place, operation in enumerate(operations):
            own = [p for p in points if p.operation == operation]
            look: dict[str, Any] = {"color": palette.hue(place), "marker": "o", "markersize": 3.5, "label": operation}
            left.plot([p.message_bytes for p in own], [p.time_ms for p in own], **look)
            known = [(p.message_bytes, p.bandwidth / 1e6) for p in own if p.bandwidth is not None]
            right.plot([size for size, _ in known], [rate for _, rate in known], **look)
        left.set_ylabel("time (ms)")
        right.set_ylabel("bandwidth (MB/s)")
        for axes, field, scale in ((left, "time_ms", 1.0), (right, "bandwidth", 1e-6)):
            axes.set_xlabel("message (bytes)")
            axes.set_xscale("log")
            drawing.log_axis(axes, "y", [v * scale for p in points if (v := getattr(p, field)) is not None])
        drawing.legend(figure, [left])

    fastest = max(points, key=lambda p: p.bandwidth or 0)
    rate = f"{fastest.bandwidth / 1e6:,.4g} MB/s" if fastest.bandwidth else "not recorded"
    headers = ["operation", "message (bytes)", "sent per rank (bytes)", "time (ms)", "90th percentile (ms)"]
    return Chart(
        f"collectives-{index}",
        f"Time and bandwidth by message size: {title}",
        "Two line charts, message size in bytes across (logarithmic): time in ms, and bandwidth in MB/s, one line per "
        "collective.",
        f"Highest bandwidth: {fastest.operation}, {rate}.",
        draw,
        Table(
            [*headers, "bandwidth (bytes/s)"],
            [[p.operation, p.message_bytes, p.sent_bytes, p.time_ms, p.time_ms_p90, p.bandwidth] for p in points],
        ),
        (8.0, 3.7),
        records=[record],
    )


def _peers(index: int, title: str, rates: list[list[float]]) -> Sheet:
    rows = [[f"GPU {i}", *(rate / 1e9 for rate in row)] for i, row in enumerate(rates)]
    table = Table(["from \\ to (GB/s)", *(f"GPU {i}" for i in range(len(rows)))], rows)
    fastest = max((rate for row in rates for rate in row), default=0.0)
    said = f"Fastest: {fastest / 1e9:,.4g} GB/s."
    return Sheet(f"peer-copies-{index}", f"Copies between GPUs: {title}", table, verdict=said)

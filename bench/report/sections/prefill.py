"""Prefill time of token pruning against prompt length, beside its FLOP bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bench.report import drawing, palette
from bench.report.content import Block, Chart, Section, Sheet
from bench.report.evidence import Evidence
from bench.report.features.tokens import pruned_arms
from bench.report.values import Record, count, number, text
from common.tables import Table

_LEAD = (
    "Time to the first token, all arms interleaved in one process, median and interquartile range. The dashed line of "
    "the same colour is the speed-up that the arithmetic left out would allow; a point above it deserves distrust."
)
_VALUES = ("ms_median", "ms_iqr", "speedup", "speedup_spread", "bound", "peak_bytes")
_LONGEST = (
    "arm",
    "length (tokens)",
    "unpruned (ms)",
    "pruned (ms)",
    "speed-up (×)",
    "bound (×)",
    "cost of keeping all (%)",
)
_MEMORY_ARMS = ("baseline", "pruned")


@dataclass(frozen=True)
class Point:
    """One arm at one prompt length; None where not recorded."""

    length: int
    arm: str
    ms_median: float
    ms_iqr: float | None
    speedup: float | None
    speedup_spread: float | None
    bound: float | None
    peak_bytes: float | None


@dataclass(frozen=True)
class Prefill:
    """One run's measurements by length, the arms that prune, the devices that computed, and parts copied to them."""

    points: list[Point]
    pruned: list[str]
    devices: list[str]
    offloaded: list[str]

    @property
    def placed(self) -> str:
        """Where the model was, in words; "" when not recorded."""
        devices = f"Ran on {', '.join(self.devices)}." if self.devices else ""
        if not self.offloaded:
            return devices
        return f"{devices} Offloaded, so times measure transfers: {', '.join(self.offloaded)}."

    def at(self, length: int, arm: str) -> Point | None:
        """The measurement of an arm at a length."""
        return next((p for p in self.points if (p.length, p.arm) == (length, arm)), None)


def _point(entry: Record) -> Point:
    length, median = entry["length"], number(entry, "ms_median")
    if not isinstance(length, int) or length < 1 or median is None:
        raise ValueError(f"arm {entry['arm']} has length {length!r} and ms_median {entry.get('ms_median')!r}")
    rest = (number(entry, name) for name in _VALUES[1:])
    return Point(length, str(entry["arm"]), median, *rest)


def parse(block: Any) -> Prefill:
    """The record's block `prefill`: a list `arms` with one entry for each length and arm.

    Raises:
        ValueError: There is no measurement in it, or one without a length or time.
    """
    points = sorted(map(_point, block["arms"]), key=lambda p: p.length)
    if not points:
        raise ValueError(f"no length was measured; left out: {text(block.get('skipped'))}")
    place = block.get("placement") or {}
    return Prefill(
        points,
        pruned_arms(block),
        *([str(part) for part in place.get(name) or []] for name in ("devices", "offloaded")),
    )


def parse_memory(block: Any) -> list[Any]:
    """The record's block `prefill_memory`: its limit, and the longest prompt of each arm in `_MEMORY_ARMS`."""
    longest = {str(arm["arm"]): int(arm["longest"]) for arm in block["arms"]}
    return [int(block["limit_bytes"]), *(longest.get(arm) for arm in _MEMORY_ARMS)]


def section(evidence: Evidence) -> Section | None:
    """Speed-up and peak memory by length, and longest prompts; None when no run measured its prefill."""
    found, memory = evidence.blocks("prefill", parse), evidence.blocks("prefill_memory", parse_memory)
    blocks: list[Block] = []
    if found:
        rows = [[name, *row] for name, prefill in found for row in _longest(prefill)]
        table = Table(["run", *_LONGEST, "remarks"], rows)
        note = drawing.last_runs(len(found))
        timed = [p for _, one in found for p in one.points if p.arm in one.pruned and p.speedup is not None]
        best = max(timed, key=lambda p: p.speedup or 0.0, default=None)
        said = f"{count(len(found), 'run')} timed it, none with a pruned arm."
        if best:
            bound = f", bound {best.bound:.2f} ×" if best.bound is not None else ""
            said = f"At best {best.speedup:.2f} × as fast, at {best.length:,} tokens{bound}."
        runs = evidence.having("prefill")
        blocks.append(Sheet("prefill", "At each run's longest length", table, note, said, records=runs))
    for index, (name, prefill) in enumerate(found[-drawing.MAX_RUNS :]):
        if any(p.speedup is not None for p in prefill.points):
            blocks.append(_chart(index, name, prefill, evidence.having("prefill")))
    if memory:
        headers = ["run", "memory (bytes)", "unpruned (tokens)", "pruned (tokens)"]
        table = Table(headers, [[name, *row] for name, row in memory])
        longest = max((row[2] or 0 for _, row in memory), default=0)
        said = f"The longest prompt that fits when pruned: {longest:,} tokens."
        runs = evidence.having("prefill_memory")
        blocks.append(Sheet("prefill-memory", "Longest prompt that fits", table, verdict=said, records=runs))
    return Section("prefill", "Prefill with pruned tokens", _LEAD, blocks) if blocks else None


def _longest(prefill: Prefill) -> list[list[Any]]:
    """A row for each arm that prunes; one without where none does."""
    length = prefill.points[-1].length
    plain, whole = (prefill.at(length, arm) for arm in ("baseline", "keep-1.0"))
    before = None if plain is None else plain.ms_median
    overhead = None if whole is None or not whole.speedup else 100 * (1 / whole.speedup - 1)
    rows: list[list[Any]] = []
    for arm in prefill.pruned or [""]:
        pruned = prefill.at(length, arm)
        values = [None if pruned is None else getattr(pruned, name) for name in ("ms_median", "speedup", "bound")]
        rows.append([arm or None, length, before, *values, overhead, prefill.placed])
    return rows


def _line(points: list[Point], arm: str, field: str) -> tuple[list[int], list[float]]:
    pairs = [(p.length, getattr(p, field)) for p in points if p.arm == arm and getattr(p, field) is not None]
    return [length for length, _ in pairs], [value for _, value in pairs]


def _chart(index: int, name: str, prefill: Prefill, records: Sequence[Record]) -> Chart:
    points = prefill.points
    arms = list(dict.fromkeys(p.arm for p in points))
    memory = any(p.peak_bytes is not None for p in points)

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, 2 if memory else 1)
        axes[0].axhline(1.0, color=palette.TEXT, linewidth=0.9)
        for place, arm in enumerate(arms):
            look: dict[str, Any] = {"color": palette.hue(place), "label": drawing.label(arm)}
            lengths, speedups = _line(points, arm, "speedup")
            errors = [p.speedup_spread or 0.0 for p in points if p.arm == arm and p.speedup is not None]
            axes[0].errorbar(lengths, speedups, yerr=errors, marker="o", **look)
            axes[0].plot(*_line(points, arm, "bound"), color=look["color"], linestyle="--", linewidth=1.1)
            if memory:
                lengths, sizes = _line(points, arm, "peak_bytes")
                axes[1].plot(lengths, [size / 1e9 for size in sizes], marker="o", **look)
        axes[0].set_ylabel("speed-up over the unpruned model (×)")
        axes[-1].set_ylabel("peak memory (GB)" if memory else axes[0].get_ylabel())
        ticks = sorted({p.length for p in points})
        for one in axes:
            one.set_xscale("log", base=2)
            one.set_xticks(ticks, [f"{length:,}" for length in ticks], rotation=45 if len(ticks) > 5 else 0)
            one.minorticks_off()
            one.set_xlabel("prompt length (tokens)")
        drawing.legend(figure, axes)

    best = max((p for p in points if p.speedup is not None), key=lambda p: p.speedup or 0)
    speedup = ("speed-up (×)", "± (×)", "bound (×)")
    headers = ["length (tokens)", "arm", "median (ms)", "IQR (ms)", *speedup, "peak memory (bytes)"]
    return Chart(
        f"prefill-{index}",
        f"Prefill speed-up by prompt length: {name}",
        "Line chart, prompt length in tokens across (logarithmic), speed-up over the unpruned model up, dashed bounds, "
        "one colour per arm.",
        f"Highest: {best.arm} with {best.speedup:.3g} × at {best.length:,} tokens.",
        draw,
        Table(headers, [[p.length, p.arm, *(getattr(p, field) for field in _VALUES)] for p in points]),
        (8.0, 3.7),
        prefill.placed,
        records,
    )

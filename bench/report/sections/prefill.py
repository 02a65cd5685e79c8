"""Prefill time of token pruning against prompt length, beside its FLOP bound."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bench.report import drawing, palette
from bench.report.content import Chart, Section
from bench.report.evidence import Evidence
from bench.report.values import number
from bench.tables import Table

_LEAD = (
    "Time to the first token, all arms interleaved in one process, median and interquartile range. The dashed line of "
    "the same colour is the speed-up that the arithmetic left out would allow; a point above it deserves distrust."
)
_VALUES = ("ms_median", "ms_iqr", "speedup", "bound", "peak_bytes")


@dataclass(frozen=True)
class Point:
    """One arm at one prompt length; None where not recorded."""

    length: int
    arm: str
    ms_median: float
    ms_iqr: float | None
    speedup: float | None
    bound: float | None
    peak_bytes: float | None


def _walk(block: Any, length: Any = None, arm: Any = None) -> Iterator[Point]:
    """Measurements anywhere in the block; length and arm are named beside the values or by the keys above them."""
    if isinstance(block, list):
        for item in block:
            yield from _walk(item, length, arm)
    elif isinstance(block, dict):
        length, arm = block.get("length", length), block.get("arm", arm)
        median = number(block, "ms_median")
        if median is not None:
            rest = (number(block, name) for name in _VALUES[1:])
            yield Point(int(length), str(arm), median, *rest)
            return
        for key, item in block.items():
            is_length = str(key).isdigit()
            yield from _walk(item, key if is_length else length, arm if is_length else key)


def parse(block: Any) -> list[Point]:
    """The record's block `prefill`, by length.

    Raises:
        ValueError: There is no measurement in it.
    """
    found = sorted(_walk(block), key=lambda p: p.length)
    if not found:
        raise ValueError("no measurement with ms_median")
    return found


def section(evidence: Evidence) -> Section | None:
    """Speed-up and peak memory by length; None when no run timed its prefill."""
    found = evidence.blocks("prefill", parse)
    charts = []
    for index, (name, points) in enumerate(found):
        if any(p.speedup is not None for p in points):
            charts.append(_chart(index, name, points))
    return Section("prefill", "Prefill with pruned tokens", _LEAD, charts) if charts else None


def _line(points: list[Point], arm: str, field: str) -> tuple[list[int], list[float]]:
    pairs = [(p.length, getattr(p, field)) for p in points if p.arm == arm and getattr(p, field) is not None]
    return [length for length, _ in pairs], [value for _, value in pairs]


def _speedup_error(point: Point) -> float:
    """Half the interquartile range of the time, carried over to the speed-up."""
    return 0.0 if point.ms_iqr is None or not point.speedup else point.speedup * point.ms_iqr / 2 / point.ms_median


def _chart(index: int, name: str, points: list[Point]) -> Chart:
    arms = list(dict.fromkeys(p.arm for p in points))
    memory = any(p.peak_bytes is not None for p in points)

    def draw(figure: Figure) -> None:
        axes = drawing.grid(figure, 2 if memory else 1)
        axes[0].axhline(1.0, color=palette.TEXT, linewidth=0.9)
        for place, arm in enumerate(arms):
            look: dict[str, Any] = {"color": palette.hue(place), "label": drawing.label(arm)}
            lengths, speedups = _line(points, arm, "speedup")
            errors = [_speedup_error(p) for p in points if p.arm == arm and p.speedup is not None]
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
    headers = ["length (tokens)", "arm", "median (ms)", "IQR (ms)", "speed-up (×)", "bound (×)", "peak memory (bytes)"]
    return Chart(
        f"prefill-{index}",
        f"Prefill speed-up by prompt length: {name}",
        "Line chart, prompt length in tokens across (logarithmic), speed-up over the unpruned model up, dashed bounds, "
        f"one colour per arm. Highest: {best.arm} with {best.speedup:.3g} × at {best.length:,} tokens.",
        draw,
        Table(headers, [[p.length, p.arm, *(getattr(p, field) for field in _VALUES)] for p in points]),
        (8.0, 3.7),
    )

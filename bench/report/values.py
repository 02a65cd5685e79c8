"""Reading values out of records that may hold anything, and summing them up over repeats."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from bench.tables.compare import lookup
from common.tables import NOT_RECORDED, cell

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over repeats.

    Attributes:
        mean: Mean of the values; may be inf or NaN when a run diverged.
        sd: Sample standard deviation (n − 1); None for a single value.
        n: Number of values.
    """

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        """Mean ± sd, both to the second significant digit of the sd; the mean alone where repeats do not differ."""
        if not self.sd or not math.isfinite(self.sd):
            return cell(self.mean)
        digits = 1 - math.floor(math.log10(self.sd))
        mean, sd = round(self.mean, digits), round(self.sd, digits)
        places = max(digits, 0)
        return f"{mean:,.{places}f} ± {sd:,.{places}f}" if places < 7 else f"{self.mean:.4g} ± {self.sd:.2g}"

    @property
    def error(self) -> float:
        """Half-length of an error bar: 0 where there is nothing to draw."""
        return self.sd if self.sd is not None and math.isfinite(self.sd) else 0.0

    def scaled(self, factor: float) -> "Spread":
        """The same spread in another unit."""
        return Spread(self.mean * factor, None if self.sd is None else self.sd * abs(factor), self.n)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Spread of the values that were recorded; None when there is none."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    if not all(map(math.isfinite, known)):
        return Spread(sum(known) / len(known), None, len(known))
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def ratio(over: Spread | None, under: Spread | None) -> Spread | None:
    """over / under with the error of independent measurements; None where either is missing or the divisor is 0."""
    if over is None or under is None or not under.mean:
        return None
    mean = over.mean / under.mean
    if over.sd is None or under.sd is None or not over.mean:
        return Spread(mean, None, min(over.n, under.n))
    relative = math.hypot(over.sd / over.mean, under.sd / under.mean)
    return Spread(mean, abs(mean) * relative, min(over.n, under.n))


def number(record: Record, field: str) -> float | None:
    """A number of the record ("structure.ppl_before" reaches into blocks); None when absent or not a number."""
    value = lookup(record, field)
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def per_step(record: Record, field: str) -> float | None:
    """A total over the measured steps, per optimizer step."""
    total, steps = number(record, field), number(record, "steps_measured")
    return total / steps if total is not None and steps else None


def total(parts: Sequence[float | None]) -> float | None:
    """Sum of the parts; None when one is not recorded, since the rest would pass for the whole."""
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def text(value: Any) -> str:
    """One line of text for anything a record may hold."""
    return " ".join(cell(value).split()) or NOT_RECORDED


def budget(row: Mapping[str, Any]) -> str:
    """What stays at each stage of a prompt: "keep 0.5", "keep 0.3, 0.1" where stages differ, "256 tokens"; else ""."""
    keep, tokens = row.get("keep"), row.get("tokens")
    if tokens is not None:
        return f"{text(tokens)} tokens"
    return "" if keep is None else f"keep {text(keep)}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 run", "2 runs"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def quantity(value: float, unit: str) -> str:
    """A number with the prefix that leaves one to three digits before the point: "63.6 M", "1.2 MB", "1 Gbit/s"."""
    value = float(f"{value:.3g}")  # else 999.7 would be 1e+03 of its prefix
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}".strip()
    return f"{value:.3g} {unit}".strip()

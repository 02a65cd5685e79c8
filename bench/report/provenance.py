"""Where numbers come from: records by commit, machine and command, each such origin with a number to link to."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from bench.report.values import Record, text
from bench.tables import figures
from common.tables import Table

_OWN = "each run's own, under Runs"


class Origin(NamedTuple):
    """What records may have in common."""

    commit: str
    machine: str
    torch: str
    command: str


def origin(record: Record) -> Origin:
    """Origin of a record; what it does not say is "not recorded"."""
    machine, versions = record.get("machine"), record.get("versions")
    known = machine if isinstance(machine, dict) else {}
    gpus = [text(gpu.get("name")) for gpu in known.get("gpus") or [] if isinstance(gpu, dict)]
    hardware = [f"{len(gpus)} × {' / '.join(sorted(set(gpus)))}"] if gpus else []
    hardware += [text(known.get("cpu")), f"{text(known.get('cores_usable'))} cores"] if known else []
    commit = record.get("git_commit")
    dirty = " with local changes" if record.get("git_dirty") else ""
    return Origin(
        text(commit[:10] if isinstance(commit, str) else None) + dirty,
        text(", ".join(hardware) or None),
        text(versions.get("torch") if isinstance(versions, dict) else None),
        text(figures.command(record)) if record.get("kind") == "figure" else _OWN,
    )


class Provenance:
    """Numbers of all origins, in order of the records.

    Args:
        records: Every record that something is shown of.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._places: dict[Origin, int] = {}
        self._records: dict[Origin, list[Record]] = {}
        for one in records:
            found = origin(one)
            self._places.setdefault(found, len(self._places) + 1)
            self._records.setdefault(found, []).append(one)

    def numbers(self, records: Iterable[Record]) -> list[int]:
        """The origins of some records, rising; those of records that are not known are left out."""
        return sorted({self._places[found] for one in records if (found := origin(one)) in self._places})

    def table(self) -> Table:
        """A row for each origin."""
        rows = [
            [self._places[found], *found[:3], len(some), _days(some), found.command]
            for found, some in self._records.items()
        ]
        return Table(["origin", "commit", "machine", "torch", "records", "measured", "command"], rows)


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of consecutive numbers: [1, 2, 3, 7] are (1, 3) and (7, 7)."""
    stretches = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    found = [[number for _, number in pairs] for _, pairs in stretches]
    return [(some[0], some[-1]) for some in found]


def links(numbers: Sequence[int]) -> Markup:
    """The origins of a block as links; "" without any."""
    if not numbers:
        return Markup("")
    stretches = [
        link(first) if first == last else link(first) + (", " if last == first + 1 else " to ") + link(last)
        for first, last in ranges(numbers)
    ]
    name = "Origin" if len(numbers) == 1 else "Origins"
    return Markup('<p class="origin">{}: {}</p>').format(name, Markup(", ").join(stretches))


def link(number: int) -> Markup:
    """One origin as a link."""
    return Markup('<a href="#origin-{}">{}</a>').format(number, number)


def _days(records: Sequence[Record]) -> str | None:
    days = sorted({str(one["date"])[:10] for one in records if one.get("date")})
    return None if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"

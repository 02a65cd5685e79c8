"""What a sweep shows while it runs: a live table on a terminal, a line a run in a log, nothing in CI."""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from bench.sweep.plan import Run
from common.progress import duration, interactive, unwatched
from common.tables import Table

_SHOWN = 12  # last finished runs in the live table
_RESULTS = ("val_ppl", "step_time_ms_p50", "compression_ratio")


def typical(records: Sequence[Mapping[str, Any]], run: Run | None = None) -> float | None:
    """Median seconds of finished runs; of those on the same link as `run`, where there are any. None without any."""
    times = [(r["wall_s"], r.get("link_rate")) for r in records if r.get("kind") == "run" and r.get("wall_s")]
    alike = [wall for wall, rate in times if run is not None and rate == run.link]
    return statistics.median(alike or [wall for wall, _ in times]) if times else None


def expected(records: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> float | None:
    """Seconds that `runs` will take, judged by those that finished."""
    each = [typical(records, run) for run in runs]
    return sum(one for one in each if one is not None) if records and None not in each else None


def row(record: Mapping[str, Any]) -> list[Any]:
    """A finished run in the table: name, state, seconds, results."""
    if record["kind"] == "failure":
        return [record["run_name"], "failed", duration(record["wall_s"]), *["" for _ in _RESULTS]]
    return [record["run_name"], "done", duration(record["wall_s"]), *(record.get(field) for field in _RESULTS)]


def table(rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    """Runs by name with state and results."""
    return Table(["run", "state", "took", "val PPL", "step, median (ms)", "compression"], rows, title)


class SweepProgress:
    """Shows how far a sweep is.

    Args:
        pending: The runs to be made, in order.
        before: Records of runs that were finished earlier, from which the time left is judged at first.
    """

    def __init__(self, pending: Sequence[Run], before: Sequence[Mapping[str, Any]]) -> None:
        self.pending = list(pending)
        self.before = list(before)
        self.finished: list[Mapping[str, Any]] = []
        self._lines = not unwatched() and not sys.stderr.isatty()
        self._live = Live(self, console=Console(stderr=True), refresh_per_second=1) if interactive() else None
        self._began = time.monotonic()

    def __enter__(self) -> "SweepProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def starts(self) -> None:
        """The next run starts."""
        self._began = time.monotonic()

    def ended(self, record: Mapping[str, Any]) -> None:
        """A run ended and this is its record."""
        self.finished.append(record)
        if self._lines:
            what, state, took, ppl, *_ = row(record)
            quality = f", PPL {ppl:.2f}" if isinstance(ppl, float) else ""
            print(f"{self._headline()}: {what} {state} in {took}{quality}", file=sys.stderr, flush=True)

    def _headline(self) -> str:
        failed = sum(record["kind"] == "failure" for record in self.finished)
        left = self.pending[len(self.finished) :]
        seconds = expected([*self.before, *self.finished], left)
        text = f"{len(self.finished)}/{len(self.pending)} runs"
        text += f", {failed} failed" if failed else ""
        return text + (f", about {duration(seconds)} left" if left else "")

    def __rich__(self) -> Group:
        rows = [row(record) for record in self.finished[-_SHOWN:]]
        if len(self.finished) < len(self.pending):
            current = self.pending[len(self.finished)]
            rows.append([current.name, "running", duration(time.monotonic() - self._began), "", "", ""])
        return Group(table(rows), Text(self._headline()))

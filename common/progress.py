"""Progress of long work outside training: a bar for people; for logs a line now and then, and one at the end."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_utilities.core import rank_zero
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 30.0
QUIET = "PARE_QUIET"  # set by `--quiet`, for this process and those that it starts


def unwatched() -> bool:
    """Whether nobody wants progress: the log of a continuous integration, or a command told to be quiet."""
    return os.environ.get("CI", "").lower() in ("1", "true") or bool(os.environ.get(QUIET))


def interactive() -> bool:
    """Whether somebody watches: standard error is a terminal, and progress is wanted."""
    return sys.stderr.isatty() and not unwatched()


@contextmanager
def stage(title: str, total: int, unit: str = "", start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show one stage as it goes, with the time left, and log one line when it is done.

    On a terminal it is a bar, elsewhere a line every half minute.

    Args:
        title: What is being done, e.g. ``"Reading train.json"``.
        total: Amount of work.
        unit: ``"bytes"`` for sizes; anything else names what is counted.
        start: What of it an earlier run has done.

    Yields:
        A function to call with the amount done so far, ``start`` included.
    """
    started = said = time.monotonic()
    watched = interactive()
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    shown = reached = start

    def show(done: int) -> None:
        nonlocal shown, said, reached
        reached = done
        if watched and done - shown >= total / 500:  # a call for every small document would cost more than the document
            shown = done
            bar.update(task, completed=done)
        elif not watched and (now := time.monotonic()) - said >= LOG_EVERY_S:
            said = now
            left = duration((now - started) / max(done - start, 1) * max(total - done, 0))
            _log(f"{title}: {_size(done, unit, bare=True)} of {_size(total, unit)}, {left} left")

    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched) as bar:
        task = bar.add_task(title, total=total, completed=start)
        yield show
    before = f", {_size(start, unit)} of it before" if start else ""
    early = "" if reached >= total else f"{_size(reached, unit, bare=True)} of "  # it stopped early
    _log(f"{title}: {early}{_size(total, unit)} in {time.monotonic() - started:.1f} s{before}")


def _log(line: str) -> None:
    if "lightning.fabric" not in sys.modules:  # which has the logger say it; and there are no other ranks
        if not os.environ.get(QUIET):
            print(line, file=sys.stderr, flush=True)
    elif not getattr(rank_zero.rank_zero_only, "rank", 0):
        rank_zero.log.info(line)


def _size(count: int, unit: str, bare: bool = False) -> str:
    number, name = (f"{count / 1e6:.1f}", "MB") if unit == "bytes" else (f"{count:,}", unit)
    return number if bare or not name else f"{number} {name}"


def duration(seconds: float | None) -> str:
    """In the unit that people would say it in; "unknown" for None."""
    if seconds is None:
        return "unknown"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"

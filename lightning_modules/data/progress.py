"""Progress of the long stages of data preparation: a bar for people, one line for logs."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def interactive() -> bool:
    """Whether somebody watches: standard error is a terminal and this is no CI job."""
    return sys.stderr.isatty() and os.environ.get("CI", "").lower() not in ("1", "true")


@contextmanager
def stage(title: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show one stage as it goes (bar and time left) and log one line when it is done.

    Args:
        title: What is being done, e.g. ``"Reading train.json"``.
        total: Amount of work.
        unit: ``"bytes"`` for sizes; anything else names what is counted.

    Yields:
        A function to call with the amount done so far.
    """
    started = time.monotonic()
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    shown = 0

    def show(done: int) -> None:
        nonlocal shown
        if done - shown >= total / 500:  # a call for every small document would cost more than the document
            shown = done
            bar.update(task, completed=done)

    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not interactive()) as bar:
        task = bar.add_task(title, total=total)
        yield show
    size = f"{total / 1e6:.1f} MB" if unit == "bytes" else f"{total:,} {unit}".strip()
    rank_zero_info(f"{title}: {size} in {time.monotonic() - started:.1f} s")

"""How long the report of a thousand records takes to make and to open in a browser, and how large it is.

The records are the runs of `docs/results/records`, repeated as if with other seeds.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.experiments.runs import ROOT, say
from bench.tables import figures
from common.records import record

RECORDS = "report.jsonl"
COUNT, REPEATS = 1000, 3
_COMMAND = "python -m bench experiment report_speed"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures; without a browser, opening is not measured."""
    folder.mkdir(parents=True, exist_ok=True)
    many, page = folder / "many.jsonl", folder / "report.html"
    many.unlink(missing_ok=True)
    files = sorted((ROOT / "docs/results/records").glob("*.jsonl"))
    runs = [one for file in files for one in record.read(file)[0] if one.get("kind") == "run"]
    for i in range(COUNT):
        turn, one = divmod(i, len(runs))
        again = {"seed": (runs[one].get("seed") or 0) + 1000 * turn, "run_name": f"{runs[one]['run_name']} {turn}"}
        record.append(many, runs[one] | again)
    command = [sys.executable, "-m", "bench", "report", str(many), "--output", str(page)]
    made = [_seconds(command) for _ in range(REPEATS)]
    say(f"made in {made} s")
    _figure(records, "build", "the command that makes the report", made, "s", "≤ 5 s", 5, len(runs))
    _figure(records, "size", "its file", [page.stat().st_size / 1e6], "MB", "≤ 5 MB", 5, len(runs))
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        say("no browser here: what it takes to open is left as it was measured before")
        return
    show = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    # a browser that shows nothing starts as long
    pairs = [(_seconds([*show, page.as_uri()]), _seconds([*show, "about:blank"])) for _ in range(REPEATS)]
    opened = [whole - empty for whole, empty in pairs]
    say(f"opened in {opened} s")
    what = "opening it in a headless browser, less the browser's own start"
    _figure(records, "open", what, opened, "s", "≤ 2 s", 2, len(runs))


def _seconds(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.monotonic() - started


def _figure(
    records: Path, name: str, what: str, values: list[float], unit: str, target: str, limit: float, runs: int
) -> None:
    value = statistics.median(values)
    figures.append(
        records,
        figure=f"report-{name}",
        what=f"report of {COUNT:,} records: {what}",
        value=value,
        spread=(max(values) - min(values)) / 2 if len(values) > 1 else None,
        unit=unit,
        target=target,
        reached=value <= limit,
        command=_COMMAND,
        details={"repeats": values, "different_runs": runs},
    )

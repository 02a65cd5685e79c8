"""How long Pare's own commands take to say what they are, and how long its tests take."""

import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.experiments.runs import ROOT, say
from bench.tables import figures

RECORDS = "own_time.jsonl"
COMMAND = "python -m bench experiment own_time"
REPEATS = 5
HELP_S, TESTS_MIN = 3, 15
HELP = {
    "main.py --help": ("main.py", "--help"),
    "main.py prune --help": ("main.py", "prune", "--help"),
    "python -m bench --help": ("-m", "bench", "--help"),
}
PYTEST = ("pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")  # as CI runs it


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures.

    Raises:
        RuntimeError: A test failed, or a command did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in HELP.items():
        taken = [_seconds(words, folder / "help.log") for _ in range(REPEATS)]
        say(f"{name}: {statistics.median(taken):.2f} s")
        figures.append(
            records,
            figure=f"help-{name.replace(' --help', '').replace(' ', '-')}",
            what=f"`{name}`",
            value=statistics.median(taken),
            spread=figures.spread(taken),
            unit="s",
            target=f"≤ {HELP_S} s",
            reached=statistics.median(taken) <= HELP_S,
            command=COMMAND,
            details={"repeats": taken},
        )
    results = folder / "tests.xml"
    say(f"tests: a quarter of an hour or more; what they say is in {folder / 'tests.log'}")
    minutes = _seconds(("-m", *PYTEST, f"--junitxml={results}"), folder / "tests.log") / 60
    suites = ElementTree.parse(results).getroot().iter("testsuite")
    counted = [{name: int(suite.get(name, 0)) for name in ("tests", "skipped")} for suite in suites]
    total = {name: sum(one[name] for one in counted) for name in ("tests", "skipped")}
    say(f"tests: {minutes:.1f} min, {total}")
    figures.append(
        records,
        figure="tests",
        what=f"`{' '.join(PYTEST)}`: {total['tests'] - total['skipped']:,} tests, {total['skipped']} left out",
        value=minutes,
        unit="min",
        target=f"≤ {TESTS_MIN} min on 2 CPU cores",
        reached=minutes <= TESTS_MIN,
        command=COMMAND,
        details=total,
    )


def _seconds(words: tuple[str, ...], log: Path) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        began = time.monotonic()
        status = subprocess.call(
            [sys.executable, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        taken = time.monotonic() - began
    if status:
        raise RuntimeError(f"{' '.join(words)} failed; what it said is in {log}")
    return taken

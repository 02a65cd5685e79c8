"""How long the tour takes, from an empty folder and cache to the table; with a model, the tour on that model."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from bench.experiments.runs import ROOT, say
from bench.tables import figures

RECORDS = "tour.jsonl"
COMMAND = "python -m bench experiment tour_time"
OWN_MIN, MODEL_MIN = 12, 45


def run(records: Path, folder: Path, model: Path | None = None) -> None:
    """Make the tour and append how long it took.

    Raises:
        RuntimeError: A step failed; the message says where its output is.
        ValueError: The folder has a tour, which would only go on.
    """
    option = [] if model is None else ["--model", str(model)]
    place = folder / "tour"
    if place.exists():
        raise ValueError(f"{place}: a tour was here, and would only go on: give another --folder")
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, PARE_CACHE=cache, PYTHONPATH=str(ROOT)):
        began = time.monotonic()
        command = [sys.executable, "-m", "bench", "tour", "--folder", str(place), *option]
        status = subprocess.call(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        minutes = (time.monotonic() - began) / 60
    if status:
        raise RuntimeError(f"a step of the tour failed; what each of them said is in {place / 'steps'}")
    limit = OWN_MIN if model is None else MODEL_MIN
    on = "models it trains itself, no download" if model is None else model.name
    say(f"tour on {on}: {minutes:.1f} min")
    figures.append(
        records,
        figure="tour-time" if model is None else "tour-time-model",
        what=f"the tour on {on}: from an empty folder and cache to table and report",
        value=minutes,
        unit="min",
        target=f"≤ {limit} min on 2 CPU cores",
        reached=minutes <= limit,
        command=COMMAND + ("" if model is None else " --model FOLDER"),
        details={"table": (place / "table.md").read_text(), "model": model and model.name},
    )

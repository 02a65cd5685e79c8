"""Running `main.py` for an experiment and reading what it left behind."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.records import record

ROOT = Path(__file__).parents[2]
BOOKS = ROOT.parent / "shared/data/books"


@dataclass(frozen=True)
class Run:
    """A finished `fit`.

    Attributes:
        record: Its line of results.jsonl.
        losses: Training loss by optimizer step, exactly as logged.
        wall_s: Seconds from the command's start to its end.
    """

    record: dict[str, Any]
    losses: dict[int, float]
    wall_s: float


def main_py(*arguments: str) -> list[str]:
    """The command line that starts Pare from any folder."""
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def fit(folder: Path, config: str, *overrides: str, prefix: Sequence[str] = (), command: str = "fit") -> Run:
    """Run `main.py fit`, or another command that leaves a record, in a folder of its own with its logs and records.

    Args:
        folder: Working folder; made when missing. A log of the output is kept in it.
        config: Path of the configuration, relative to the repository.
        overrides: Further arguments.
        prefix: What the command is started with, such as a link emulator.
        command: Command of `main.py`.

    Raises:
        RuntimeError: The run failed; the message ends with its last output.
    """
    wall = run_main(folder, command, config, *overrides, prefix=prefix)
    records, _ = record.read(next(folder.glob("runs/*.jsonl")))
    return Run(records[-1], losses(folder), wall)


def run_main(folder: Path, command: str, config: str, *overrides: str, prefix: Sequence[str] = ()) -> float:
    """Run a command of `main.py` in a folder; see `fit`.

    Returns:
        Seconds from the command's start to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started_as = [*prefix, *main_py(command, "--config", str(ROOT / config), *overrides)]
    started = time.monotonic()
    with open(folder / "output.log", "w") as log:
        environment = {**os.environ, "CI": "true", "PYTHONPATH": str(ROOT)}
        code = subprocess.call(
            started_as, cwd=folder, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    wall = time.monotonic() - started
    if code:
        tail = (folder / "output.log").read_text()[-2000:]
        raise RuntimeError(f"exit status {code} of {' '.join(started_as)}\n{tail}")
    return wall


def sweep(name: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run what is missing of a sweep of `configs/bench`.

    Args:
        name: Name of the sweep.
        folder: Where it keeps its own results; what is finished there is not run again.
        arguments: Arguments of `main.py` for every run.

    Returns:
        The records of all of its runs.

    Raises:
        CalledProcessError: A run failed; its output is below the folder.
    """
    results = folder / f"{name}.jsonl"
    command = ["-m", "bench", "sweep", "--config", f"configs/bench/{name}.yaml", "--results", str(results)]
    subprocess.run([sys.executable, *command, "--", *arguments], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    return [one for one in record.read(results)[0] if one.get("kind") == "run"]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by optimizer step from the CSV logs below a folder; later files continue earlier ones."""
    found: dict[int, float] = {}
    logs = sorted(folder.glob("runs/*/csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    for log in logs:
        with open(log, newline="") as file:
            found |= {
                int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")
            }
    return found


def say(text: str) -> None:
    """Progress of a long experiment, on stderr."""
    print(text, file=sys.stderr, flush=True)


def books(*, tokenizer_vocab: int = 4096) -> list[str]:
    """Arguments that train on the books corpus.

    Raises:
        FileNotFoundError: The corpus is not beside this checkout.
    """
    return [*corpus(), "--data.vocab_size", str(tokenizer_vocab)]


def books_beside() -> list[str]:
    """The same corpus, its path relative to the repository, for sweeps; the vocabulary is the configuration's."""
    return corpus(Path(os.path.relpath(BOOKS, ROOT)))


def corpus(folder: Path = BOOKS) -> list[str]:
    """The same corpus with the vocabulary of the configuration.

    Raises:
        FileNotFoundError: The corpus is not beside this checkout.
    """
    if not (BOOKS / "train.json").is_file():
        raise FileNotFoundError(f"no books corpus at {BOOKS}: give any JSON arrays there as train.json and valid.json")
    files = ("--data.train", str(folder / "train.json"), "--data.val", str(folder / "valid.json"))
    return ["--data", "TextCorpus", *files]

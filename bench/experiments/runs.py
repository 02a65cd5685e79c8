"""Running `main.py` for an experiment and reading what it left behind."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.network import link
from bench.network.process import kill_tree
from common.files import write_text
from common.records import machine, record

ROOT = Path(__file__).parents[2]
BOOKS = ROOT.parent / "shared/data/books"
_PERPLEXITY = re.compile(r"val/ppl\s+│\s+(\S+)")


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


def claim(folder: Path, *inputs: Path, **asked: Any) -> str | None:
    """Make a working folder that of one experiment: what is finished in it may then be taken instead of run again.

    Args:
        folder: Made when missing. ``asked.json`` in it says what the runs in it are of.
        inputs: Files and folders whose content the runs depend on.
        asked: What else they depend on, JSON-able.

    Returns:
        The commit that the runs are of, for the figures' details; None outside a checkout.

    Raises:
        ValueError: The folder has runs of another commit, changed code, other inputs or arguments, or of nobody knows.
    """
    commit = machine.git_state()["git_commit"]
    changes = ("git", "diff", "HEAD", "--", ".", ":(exclude)docs", ":(exclude)*.md")
    changed = subprocess.run(changes, cwd=ROOT, capture_output=True, check=False).stdout
    mine = {
        "commit": commit,
        "uncommitted changes": hashlib.sha256(changed).hexdigest(),
        "inputs": {str(path): _content(path) for path in inputs},
        "arguments": json.loads(json.dumps(asked)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "asked.json"
    if said.is_file():
        before = json.loads(said.read_text(encoding="utf-8"))
        others = [name for name, value in mine.items() if before.get(name) != value]
        if others:
            raise ValueError(
                f"{folder} has runs of another state ({', '.join(others)}): give another --folder, or delete this one"
            )
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and nothing says what its runs are of: give another --folder")
    write_text(said, json.dumps(mine, indent=1) + "\n")
    return str(commit) if commit is not None else None


def _content(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as content:
                part = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.relative_to(path)} {part}\n".encode())
    return digest.hexdigest()


def main_py(*arguments: str) -> list[str]:
    """The command line that starts Pare from any folder."""
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def fit(
    folder: Path,
    config: str,
    *overrides: str,
    prefix: Sequence[str] = (),
    command: str = "fit",
    timeout_s: float | None = None,
) -> Run:
    """Run `main.py fit`, or another command that leaves a record, in a folder of its own with its logs and records.

    Args:
        folder: Working folder; made when missing. A log of the output is kept in it.
        config: Path of the configuration, relative to the repository.
        overrides: Further arguments.
        prefix: What the command is started with, such as a link emulator.
        command: Command of `main.py`.
        timeout_s: Seconds after which the run and all that it started are killed; None waits for ever.

    Raises:
        RuntimeError: The run failed; the message ends with its last output.
        TimeoutError: The run took too long; the message ends with its last output.
    """
    wall = run_main(folder, command, config, *overrides, prefix=prefix, timeout_s=timeout_s)
    records, _ = record.read(next(folder.glob("runs/*.jsonl")))
    return Run(records[-1], losses(folder), wall)


def run_main(
    folder: Path,
    command: str,
    config: str,
    *overrides: str,
    prefix: Sequence[str] = (),
    timeout_s: float | None = None,
) -> float:
    """Run a command of `main.py` in a folder; see `fit`.

    Returns:
        Seconds from the command's start to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started_as = [*prefix, *main_py(command, "--config", str(ROOT / config), *overrides)]
    started = time.monotonic()
    with open(folder / "output.log", "w") as log:
        environment = {**os.environ, "CI": "true", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            started_as, cwd=folder, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:  # nothing that it started may go on beside what comes next
                kill_tree(psutil.Process(process.pid))
                process.wait()
    wall = time.monotonic() - started
    if process.returncode:
        tail = f"{' '.join(started_as)}\n{(folder / 'output.log').read_text()[-2000:]}"
        if timed_out:
            raise TimeoutError(f"not done in {timeout_s:.0f} s:\n{tail}")
        raise RuntimeError(f"exit status {process.returncode} of {tail}")
    return wall


def halves(folder: Path, texts: Mapping[str, Path]) -> dict[str, Path]:
    """Write the first halves of all texts as one text for calibration, and the second halves, which are returned."""
    # imports Lightning, which takes ten seconds that the rest of the bench does without
    from lightning_modules.data.readers import document_text, read_records

    first: list[str] = []
    second: dict[str, Path] = {}
    for name, path in texts.items():
        documents = [document_text(one, where) for one, where, _ in read_records([path])]
        if len(documents) < 2:
            raise ValueError(f"{path}: too short to be cut in two")
        first += documents[: len(documents) // 2]
        second[name] = folder / f"evaluated-{name}.json"
        second[name].write_text(json.dumps([{"text": text} for text in documents[len(documents) // 2 :]]))
    (folder / "calibration.json").write_text(json.dumps([{"text": text} for text in first]))
    return second


def once(folder: Path, command: str, config: str, *arguments: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a command of `main.py`, run unless it has been."""
    results = folder / "runs/results.jsonl"
    if not results.exists():
        took = run_main(folder, command, config, *arguments, prefix=prefix)
        say(f"{folder.parent.name}/{folder.name}: {took:.0f} s")
    return record.read(results)[0][-1]


def validated(folder: Path, config: str, *arguments: str) -> float:
    """The perplexity that `main.py validate` says, run unless it has been.

    Raises:
        RuntimeError: It failed, or said none.
    """
    log = folder / "output.log"
    if not log.exists() or not (said := _PERPLEXITY.findall(log.read_text())):
        took = run_main(folder, "validate", config, *arguments)
        say(f"{folder.parent.name}/{folder.name}: {took:.0f} s")
        said = _PERPLEXITY.findall(log.read_text())
    if not said:
        raise RuntimeError(f"{log}: the validation says no val/ppl")
    return float(said[-1])


def json_lines(module: str, *arguments: str, log: Path) -> Iterator[dict[str, Any]]:
    """Run `python -m MODULE ARGUMENTS` from the repository, in a process of its own, and read what it prints.

    Args:
        module: Module to run; one that starts others, such as `torch.distributed.run`, does as well.
        arguments: Its arguments.
        log: File that receives stderr (replaced), and stdout's lines that are no JSON objects.

    Yields:
        The JSON objects that it prints, one a line, as they come.

    Raises:
        RuntimeError: It failed; the message names the command and ends with the end of the log.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
                else:
                    errors.write(line)
                    errors.flush()
        except BaseException:  # whoever reads has stopped: an interrupt, or a generator that is closed
            process.terminate()
            raise
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"exit status {process.returncode} of {' '.join(command)}\n{tail}")


def sweep(name: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run what is missing of a sweep of `configs/bench`.

    Args:
        name: Name of the sweep.
        folder: Where it keeps its own results; what is finished there is not run again.
        arguments: Arguments of `main.py` for every run.

    Returns:
        The records of all of its runs.

    Raises:
        ValueError: Its runs need a link, which cannot be emulated here: what is modelled is no measurement.
        CalledProcessError: A run failed; its output is below the folder.
    """
    from bench.sweep.plan import plan  # which starts its runs by what stands here

    asked = yaml.safe_load((ROOT / f"configs/bench/{name}.yaml").read_text(encoding="utf-8"))
    matrix = {part: asked[part] for part in ("base", "axes", "arguments", "include", "exclude") if part in asked}
    if any(one.link for one in plan(**matrix)) and (obstacle := link.check()):
        raise ValueError(f"sweep {name} measures steps on a link, which cannot be emulated here: {obstacle}")
    results = folder / f"{name}.jsonl"
    command = ["-m", "bench", "sweep", "--config", f"configs/bench/{name}.yaml", "--results", str(results)]
    subprocess.run([sys.executable, *command, "--", *arguments], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    runs = [one for one in record.read(results)[0] if one.get("kind") == "run"]
    modelled = [one["run_name"] for one in runs if one.get("link_emulated") is False]
    if modelled:
        raise ValueError(f"{results} has runs whose link was not there ({', '.join(modelled)}): give another --folder")
    return runs


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

"""Running steps one after another, each in a process that has all imports already, and going on after a kill."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.experiments.runs import ROOT
from bench.network.launch import GRACE_S
from bench.network.process import kill_tree
from bench.tour.steps import Program, Step, to_repository
from common.files import write_text
from common.progress import duration, stage

_LINES = 15  # of a failed step's output
_POLL_S = 0.2
Start = Callable[[Step, Path, Path, Callable[[], None]], int]
"""Runs a step in a folder with its output in a file, calls back while it runs, and returns its exit status."""


@dataclass(frozen=True)
class Ended:
    """What became of a step.

    Attributes:
        step: The step.
        state: "done", "failed" or "left out".
        seconds: That it took; of one that was done before, then.
        why: Why it was left out, or its exit status.
    """

    step: Step
    state: str
    seconds: float = 0.0
    why: str = ""


def run(steps: Sequence[Step], folder: Path, start: Start | None = None) -> list[Ended]:
    """Run what has not been run; a failure stops only what needs it.

    Args:
        steps: In order.
        folder: Where they work; `steps/NAME.json` says that one is done, `steps/NAME.log` is its output.
        start: How one is run; in a process of its own when not given.
    """
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    ended: list[Ended] = []
    known = [step for step in steps if is_done(step, folder) and not step.always]
    earlier, total = sum(step.seconds for step in known), sum(step.seconds for step in steps)
    with stage("Tour", round(total), "s of work", start=round(earlier)) as show:
        for number, step in enumerate(steps, 1):
            before = earlier + sum(one.step.seconds for one in ended if one.step not in known)
            print(f"\n[{number}/{len(steps)}] {step.name}: {step.what}", flush=True)
            print(f"    {step.command(folder)}", flush=True)

            def elapsed(step: Step = step, before: float = before, began: float = time.monotonic()) -> None:
                show(round(before + min(time.monotonic() - began, step.seconds)))

            ended.append(_one(step, ended, folder, start or in_own_process, elapsed))
            print(f"    {_said(ended[-1], folder)}", flush=True)
            show(round(before + (step not in known) * step.seconds))
    return ended


def is_done(step: Step, folder: Path) -> bool:
    """Whether a folder has the results of a step, by the same command."""
    note = _note(step, folder)
    return note.is_file() and json.loads(note.read_text(encoding="utf-8")).get("command") == list(step.arguments)


def _note(step: Step, folder: Path) -> Path:
    return folder / "steps" / f"{step.name}.json"


def _one(step: Step, before: Sequence[Ended], folder: Path, start: Start, elapsed: Callable[[], None]) -> Ended:
    note, log = _note(step, folder), folder / "steps" / f"{step.name}.log"
    anew = step.always and any(one.state == "done" and not one.why for one in before)
    if is_done(step, folder) and not anew:
        return Ended(step, "done", json.loads(note.read_text(encoding="utf-8"))["seconds"], "before")
    if step.obstacle:
        return Ended(step, "left out", why=step.obstacle)
    lacking = [one.step.name for one in before if one.step.name in step.needs and one.state != "done"]
    if lacking:
        return Ended(step, "left out", why=f"needs {', '.join(lacking)}")
    note.unlink(missing_ok=True)
    began = time.monotonic()
    status = start(step, folder, log, elapsed)
    seconds = time.monotonic() - began
    if status:
        return Ended(step, "failed", seconds, f"exit status {status}")
    write_text(note, json.dumps({"command": step.arguments, "seconds": seconds}) + "\n")
    return Ended(step, "done", seconds)


def _said(one: Ended, folder: Path) -> str:
    log = folder / "steps" / f"{one.step.name}.log"
    if one.state == "failed":
        lines = log.read_text(errors="replace").strip().splitlines()[-_LINES:]
        return "\n    ".join([f"FAILED after {duration(one.seconds)}, {one.why}; all of its output: {log}", *lines])
    if one.state == "left out":
        return f"left out: {one.why}"
    return f"done {one.why} in {duration(one.seconds)}".replace("  ", " ")


# ---- one step in a process of its own --------------------------------------------------------------------------------


def in_own_process(step: Step, folder: Path, log: Path, elapsed: Callable[[], None]) -> int:
    """See ``Start``; the process is forked from one that has imported Pare, which saves the seconds that this takes.

    Whatever way this ends (an exception, too), no process of the step is left; it gets time to save first.
    """
    arguments = (step.program, step.words(to_repository(folder)), str(folder), str(log))
    process: Any = _warm().Process(target=_enter, args=arguments)
    try:
        process.start()
        while process.exitcode is None:
            process.join(_POLL_S)
            elapsed()
    except BaseException as error:
        _stop(process, getattr(error, "number", signal.SIGTERM))
        raise
    return int(process.exitcode)


def _warm() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.tour.warm"])
    return context


def _stop(process: Any, number: int) -> None:
    if process.pid is None:  # not started: the process to fork it from is still importing
        return
    tree = psutil.Process(process.pid)
    process.join(0)
    if process.exitcode is None:
        tree.send_signal(number)
        process.join(GRACE_S)
    if process.exitcode is None:
        kill_tree(tree)
        process.join()


def _enter(program: Program, words: list[str], folder: str, log: str) -> None:
    """Become the command: its own session, folder, output and arguments."""
    os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    threading.Thread(target=_end_with_the_tour, name="tour-watch", daemon=True).start()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if program == "main":
        from main import main

        sys.argv = words[1:]
        main()
    else:
        from bench.__main__ import main as bench

        sys.argv = [str(ROOT / "bench/__main__.py"), *words[3:]]
        sys.exit(bench(words[3:]))


def _end_with_the_tour() -> None:
    """End this process when the tour is gone: its next start must not find it at work. Its own children see to it."""
    tour = multiprocessing.parent_process()
    assert tour is not None
    tour.join()
    os._exit(1)


def failed(ended: Iterable[Ended]) -> list[str]:
    """Names of the steps that failed."""
    return [one.step.name for one in ended if one.state == "failed"]

"""One run of a sweep, in a folder and session of its own: started, watched, stopped, and turned into a record."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.experiments.runs import ROOT, main_py
from bench.network import bounds
from bench.network import link as links
from bench.network.launch import stop_processes
from bench.sweep.plan import Run, located
from common.records import record

_ERROR_LINES = 15


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative for a signal), whether its time was up, seconds, last lines."""

    exit_status: int
    timed_out: bool
    wall_s: float
    last_lines: str


def command_of(run: Run, emulated: bool, node_size: int | None = None) -> list[str]:
    """The command as it is started from the run's own folder, on nodes of so many ranks at most."""
    arguments = located(["--config", str(ROOT / run.base), *run.main_arguments(emulated, node_size)[2:]], Path.cwd())
    prefix = [sys.executable, "-m", "bench", *run.link_arguments()] if emulated else []
    return [*prefix, *main_py("fit", *arguments)]


def execute(command: Sequence[str], folder: Path, timeout_s: float) -> Ended:
    """Run a command to its end in an empty folder, its output in `output.log` there.

    Whatever way this ends (an exception, too, such as StopRequested), no process of the command is left. One left by a
    sweep that was killed outright is ended first.
    """
    _end_leftover(folder / "pid")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "output.log").is_file():
        raise ValueError(f"{folder} is to be the working folder of a run, but holds something else: move it away")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin, timed_out = time.monotonic(), False
    with open(folder / "output.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CI": "true", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        (folder / "pid").write_text(f"{process.pid} {_started(process.pid)}")
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            stop_processes([process], signal.SIGTERM)
        except BaseException:
            stop_processes([process], signal.SIGTERM)
            raise
        finally:
            _kill_session(process.pid)
            (folder / "pid").unlink(missing_ok=True)
    lines = (folder / "output.log").read_text(errors="replace").strip().splitlines()
    return Ended(process.returncode, timed_out, time.monotonic() - begin, "\n".join(lines[-_ERROR_LINES:]))


def _started(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def _kill_session(pid: int) -> None:
    """End ranks that outlived the process which started them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _end_leftover(note: Path) -> None:
    """End what a sweep that was killed outright left running; it may have been killed before it could note all."""
    try:
        pid, started = note.read_text().split()
        process = psutil.Process(int(pid))
        if process.create_time() != float(started):
            return  # another process, which has the same number now
        process.terminate()
        psutil.wait_procs([process], timeout=20)
        _kill_session(int(pid))
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return


def to_record(run: Run, sweep: str, emulated: bool, ended: Ended, folder: Path) -> dict[str, Any]:
    """The record of a run that ended: the one it wrote itself, or one of kind "failure", and what the sweep knows."""
    fields: dict[str, Any] = {
        "run_name": run.name,
        "sweep": sweep,
        "sweep_key": run.key,
        "axes": run.axes,
        "command": run.command(emulated),
        "wall_s": ended.wall_s,
        "link_rate": run.link,
        "link_delay": run.delay,
        "link_emulated": emulated if run.link else None,
        "ranks_per_host": run.ranks_per_host if run.link else None,
    }
    written = [r for path in sorted(folder.rglob("*.jsonl")) for r in record.read(path)[0] if r.get("kind") == "run"]
    if ended.exit_status == 0 and not ended.timed_out and written:
        found = {**written[-1], **fields}
        modelled = bounds.modelled_step_ms(found, links.rate_bits_per_s(run.link)) if run.link else None
        return {**found, "step_time_ms_modelled": modelled}
    error = ended.last_lines
    if ended.timed_out:
        error = f"stopped after {ended.wall_s:.0f} s, its time limit\n{error}"
    elif ended.exit_status == 0:
        error = f"no record was written: {run.base} needs the callback RunRecord\n{error}"
    return {"kind": "failure", **fields, "error": error, "exit_status": ended.exit_status, **record.stamp()}
